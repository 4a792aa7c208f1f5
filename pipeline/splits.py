"""Which split a name means: that of a folder, an archive or a table, or a value in a column of splits.

Split names are "train", "probe" (the trusted images) and, for evaluation sets, any other.
"""

from __future__ import annotations

import re

from pipeline.dataset import InputError

# Words, in any case, and the split each means. Not "all", "extra" or "clean": they mean one thing here, another there.
WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("probe", "trusted"), "probe"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
    **dict.fromkeys(("dev", "development"), "dev"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
    **dict.fromkeys(("holdout", "heldout"), "holdout"),
}
# What stands beside the word and says nothing about the split: train-00000-of-00001, test_images, trainset.
_FILLERS = {"of", "part", "shard", "split", "set", "data", "dataset", "image", "images", "img", "imgs"}
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_VALUE = re.compile(r"[^\W_][\w.\- ]{0,63}")  # what may be part of a file's name, everywhere


def words_of(name: str) -> set[str]:
    """Return the splits that the words of a name mean, wherever they stand in it: none, one, or several."""
    return {split for token in _tokens(name) if (split := _meant(token))}


def named(name: str) -> str | None:
    """Return the split that the first or last word of a name means, leaving out numbers and words such as "images".

    None where neither means one, or where words of the name mean two.
    """
    tokens = [token for token in _tokens(name) if not (token.isdigit() or token in _FILLERS)]
    ends = {split for token in tokens[:1] + tokens[-1:] if (split := _meant(token))}
    return ends.pop() if len(ends) == 1 and len(words_of(name)) == 1 else None


def of_value(value: str) -> str | None:
    """Return the split that a value in a column of splits means: what a known word means, else the value itself.

    None for what cannot be the name of a split, or could be meant as one of the training splits (train_old).
    """
    name = value.strip().lower()
    if split := _meant(re.sub(r"(?<=hold|held)[-_ ]?(?=out$)", "", name)):
        return split
    return name if _VALUE.fullmatch(name) and not re.search("train|trusted|probe", name) else None


def of_files(names: list[str]) -> list[str]:
    """Return the split of each of some files that hold many images, by its name or that of a folder it is in.

    All are train where no name says a split. Raises InputError where only some say one, or a name says two.
    """
    said = []
    for name in names:
        meant = {split for part in name.split("/") if (split := named(part))}
        if len(meant) > 1 or (not meant and any(len(words_of(part)) > 1 for part in name.split("/"))):
            raise InputError(f"{name} is named like two splits: rename it after one, or give a column split")
        said.append(next(iter(meant), ""))
    if len(names) == 1 and said[0] not in ("", "train"):
        raise InputError(
            f"{names[0]} is named like {said[0]}, and there is no other: rename it, or give a column split"
        )
    if any(said) and not all(said):
        name = names[said.index("")]
        raise InputError(
            f"no split can be told from the name {name}, beside {names[said.index(next(filter(None, said)))]}: "
            "rename it after its split (train, probe, val, test, dev …), or move it away"
        )
    return [one or "train" for one in said]


def _meant(word: str) -> str | None:
    # What one word means, alone or with a filler behind it: trainset.
    return WORDS.get(word) or WORDS.get(re.sub("(set|data|images|imgs)$", "", word))


def _tokens(name: str) -> list[str]:
    joined = re.sub(r"(hold|held)[-_ ]?out", r"\1out", name, flags=re.IGNORECASE)
    words = re.findall(r"[^\W\d_]+|\d+", joined)
    return [part.lower() for word in words for part in (_CAMEL.findall(word) if word.isascii() else [word]) or [word]]
