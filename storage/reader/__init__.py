"""Opens, reads and iterates a cache. Uses layout and encoding."""

from storage.reader.cache import Cache as Cache
from storage.reader.prefetch import shuffled_batches as shuffled_batches
