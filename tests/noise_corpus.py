"""A corpus of noise that trainings of a few updates run on."""

import numpy as np
import soundfile


def write_noise_corpus(root, utterances=12):
    """Writes utterances of one to two seconds to `root`, with manifests and letter labels for train, valid and test."""
    generator = np.random.RandomState(0)
    sizes = generator.randint(16000, 32000, size=utterances)
    for index, size in enumerate(sizes):
        loudness = np.repeat(0.05 + generator.rand(40), 800)[:size]
        soundfile.write(str(root / f"{index}.wav"), generator.randn(size) * loudness * 0.2, 16000)
    lines = "".join(f"{index}.wav\t{size}\n" for index, size in enumerate(sizes))
    for split in ("train", "valid", "test"):
        (root / f"{split}.tsv").write_text(f"{root}\n{lines}")
        (root / f"{split}.ltr").write_text("A B | A |\n" * utterances)
    (root / "dict.ltr.txt").write_text("| 2\nA 2\nB 1\n")
    return root
