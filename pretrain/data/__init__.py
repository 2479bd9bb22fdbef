"""The corpus: token shards on disk, and the order in which a run reads them."""

from pretrain.data.corpus import Corpus
from pretrain.data.shard_writer import ShardWriter
from pretrain.data.shards import Shard

__all__ = ["Corpus", "Shard", "ShardWriter"]
