"""CIDEr, BLEU and ROUGE-L of captions, by the COCO caption evaluation's own scorers (pycocoevalcap).

Its tokenizer needs Java; here texts are cut by a rule of our own (lower case, words and digits, no punctuation): scores
can differ from those of papers. The result names the rule.
"""

import re
from collections.abc import Sequence

from megacm3.errors import ConfigError, DataError

TOKENS = "lower case, runs of letters, digits and apostrophes"
_WORD = re.compile(r"[\w']+")


def tokens_of(text: str) -> str:
    """The words of a text, one space between them."""
    return " ".join(_WORD.findall(text.lower()))


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """cider, bleu_1 .. bleu_4 and rouge_l of captions against each one's references.

    Raises ConfigError without pycocoevalcap, DataError for a caption without reference.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as fault:
        raise ConfigError("--task caption needs the package pycocoevalcap (extra evaluate)") from fault
    if len(captions) != len(references) or not all(references):
        raise DataError(f"{len(captions)} captions with {len(references)} lists of references; expected one each")
    found = {i: [tokens_of(caption)] for i, caption in enumerate(captions)}
    wanted = {i: [tokens_of(one) for one in several] for i, several in enumerate(references)}
    result: dict[str, float | str] = {"tokens": TOKENS, "cider": float(Cider().compute_score(wanted, found)[0])}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    result |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return result | {"rouge_l": float(Rouge().compute_score(wanted, found)[0])}
