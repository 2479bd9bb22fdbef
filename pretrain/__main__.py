"""`python -m pretrain CONFIG [key=value ...]`: the worker."""

import sys

from pretrain.stopping import listen

if __name__ == "__main__":
    listen()  # torch takes seconds to import, and a job's warning may come meanwhile
    from pretrain.train import main

    sys.exit(main())
