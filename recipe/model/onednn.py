"""oneDNN, by which torch computes 16-bit products on a CPU, keeps less of what it compiled."""

import os

# oneDNN's own cache, and that of torch's layer on it.
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# A layer of any Llama with LoRA has up to 23 shapes of products, the next layers have the same, and
# oneDNN makes more than one primitive of some: of 32 the layers push each other out.
_PRODUCTS_KEPT = "64"


def keep_few_products() -> None:
    """Have the code of 64 products kept, not of 1,024, unless the environment says it.

    Each micro-batch has a length of its own: those of earlier ones are of little use, and a run's
    memory would grow with each. It counts if called before the first product.
    """
    for name in _CACHES:
        os.environ.setdefault(name, _PRODUCTS_KEPT)
