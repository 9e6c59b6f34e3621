"""Small and fast wav2vec 2.0 for fairseq: `common.user_dir=$(w2v2-light user-dir)`.

Importing the package registers its models, criterions and tasks with fairseq, where fairseq is installed. `nn` and
`runtime` need only torch.
"""

import importlib.util
import logging

__version__ = "0.1.0"

if importlib.util.find_spec("fairseq") is not None:
    # fairseq advises everyone who imports it, on stderr, to install tensorboardX
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

    from . import compat, criterions, models, tasks

    compat.allow_checkpoint_types()
    compat.make_checkpoint_copies_atomic()
    __all__ = ["compat", "criterions", "models", "tasks"]
