"""How many errors a recogniser makes on a set of references. Without fairseq."""

import time
from typing import Callable, Dict, List, NamedTuple, Optional

from ..data.progress import progress
from ..data.references import Reference
from ..runtime.scoring import Scored, Totals, score, totals

# utterances up to this many seconds are heard whole, as by fairseq's infer; longer ones are cut
WINDOW_SECONDS = 40.0


class Result(NamedTuple):
    """What one run of a model, or one file of hypotheses, was worth.

    about: how the hypotheses came about, for the report: model, operating_point, dtype, decoder; empty of a file.
    audio, compute: seconds; 0 of a file.
    """

    scored: List[Scored]
    totals: Totals
    about: Dict[str, str]
    audio: float = 0.0
    compute: float = 0.0


def recognise(
    recognizer,
    references: List[Reference],
    normalise: Callable[[str], str],
    about: Dict[str, str],
    note: Callable[[str], None],
) -> Result:
    """Transcribes the audio of references and scores the texts.

    Files that cannot be transcribed are told to `note` as they come. Raises ValueError where there were any, and unless
    there are as many texts as references.
    """
    texts, failed, audio = [], [], 0.0
    began = time.perf_counter()
    transcripts = recognizer.transcribe([reference.path for reference in references])
    for transcript in progress(transcripts, about.get("operating_point", ""), len(references)):
        if transcript.error:
            failed.append(f"{references[len(texts)].where}: {transcript.error}")
            note(failed[-1])
        texts.append(transcript.text)
        audio += transcript.seconds
    compute = time.perf_counter() - began
    if len(texts) != len(references):
        raise ValueError(f"{len(texts)} hypotheses for {len(references)} references: the recogniser lost some")
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(references)} utterances could not be transcribed, and the error rate of the others "
            f"would not be that of the set; mend or remove these: {failed[0]}"
        )
    return scored(references, texts, normalise, about)._replace(audio=audio, compute=compute)


def scored(
    references: List[Reference],
    texts: List[str],
    normalise: Callable[[str], str] = str,
    about: Optional[Dict[str, str]] = None,
) -> Result:
    """Scores one text for each reference; raises ValueError where the references hold no words."""
    require_words(references, normalise)
    utterances = [
        score(reference.name, normalise(reference.text), normalise(text)) for reference, text in zip(references, texts)
    ]
    return Result(utterances, totals(utterances), about or {})


def require_words(references: List[Reference], normalise: Callable[[str], str] = str) -> None:
    """Raises ValueError where no reference holds a word."""
    if not any(normalise(reference.text).split() for reference in references):
        raise ValueError(f"{references[0].where}: the references hold no words; the word error rate is undefined")


def check_references(references: List[Reference]) -> None:
    """Raises ValueError or FileNotFoundError for the first reference without audio that can be opened.

    To be asked before a model is loaded for hours of work.
    """
    from ..runtime.audio import check_audio

    for reference in references:
        if reference.path is None:
            raise ValueError(
                f"{reference.where}: lines of text name no audio for a model; give a manifest folder, or a table with "
                "columns path and text"
            )
        try:
            check_audio(reference.path)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{reference.where}: {error}") from None
