"""refleet keeps a fleet of inference engines on the right weights.

`refleet.publisher` compares checkpoints and broadcasts what changed, `refleet.worker` verifies, applies and
acknowledges, `refleet.common` holds what both sides agree on: facts, errors, limits, codecs, records, store, stream.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
