"""`python -m pretrain CONFIG [key=value ...]`: the worker."""

import sys

from pretrain.stopping import listening

if __name__ == "__main__":
    with listening():  # torch takes seconds to import, and a job's warning may come meanwhile
        from pretrain.train import main

        code = main()
    sys.exit(code)
