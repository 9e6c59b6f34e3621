"""Small and fast wav2vec 2.0 for fairseq: `common.user_dir=$(w2v2-light user-dir)`.

Importing the package registers its models, criterions and tasks with fairseq, at once or when fairseq is imported.
`nn` and `runtime` need only torch.
"""

from .registration import register_with_fairseq

__version__ = "0.1.0"

register_with_fairseq()
