"""The corpus: token shards on disk, and the order in which a run reads them."""

from pretrain.data.corpus import Corpus
from pretrain.data.shards import Shard, ShardWriter

__all__ = ["Corpus", "Shard", "ShardWriter"]
