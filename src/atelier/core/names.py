"""What a set calls its labels and attributes: what was typed becomes numbers, and numbers become what is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atelier.core.errors import UserError, nearest
from atelier.core.words import shell, word

if TYPE_CHECKING:  # the help reads names too, and torch takes seconds
    from collections.abc import Collection

    from atelier.core.batch import Batch


@dataclass(frozen=True)
class SetNames:
    """The names of a set, in the order of their numbers.

    Args:
        labels: name of each label; [] where labels are numbers alone.
        attributes: name of each attribute; [] where there are none.
        exclusive: groups of attributes of which an image has one at most, as the colours of hair.
    """

    labels: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    exclusive: list[list[str]] = field(default_factory=list)

    def label(self, typed: int | str, n_classes: int) -> int:
        """The number of a label, which was typed as that or by its name.

        Raises:
            UserError: there is no such label, or several are called so but for upper and lower case.
        """
        if isinstance(typed, str) and self.labels:
            return _number("label", typed, self.labels)
        if isinstance(typed, str) or typed >= n_classes:
            problem = f"the {n_classes} labels are 0 to {n_classes - 1}"
            raise UserError("label", typed, problem, f"label={n_classes - 1}")
        return typed

    def called(self, label: int) -> str | int:
        """The name of a label, else its number: what `label` makes the same number of."""
        return self.labels[label] if label < len(self.labels) else label

    def typed(self, label: int) -> str:
        """The word of a command that asks for a label."""
        return _typed("label", str(self.called(label)))

    def signs(self, typed: list[str] | str) -> list[int]:
        """What was typed of attributes: 1 for each that is to be there, -1 for what is not, 0 for what stays.

        `Smiling,Young` are these alone. `+Smiling,-Male` leaves all others as they are, but for those of which an image
        has one at most where another of them is set.

        Raises:
            UserError: there is no such attribute, some have a sign and others none, or two exclude each other.
        """
        words = [typed] if isinstance(typed, str) else typed
        signed = [one for one in words if one not in self.attributes and one[0] in "+-"]
        if signed and len(signed) < len(words):
            fix = ",".join(one if one in signed else f"+{one}" for one in words)
            problem = "signs change what is there, names without a sign are all that is to be there"
            raise UserError("attributes", ",".join(words), problem, f"attributes={fix}")
        found = [0 if signed else -1] * len(self.attributes)
        for one in words:
            sign, name = (one[0], one[1:]) if signed else ("", one)
            found[_number("attributes", name, self.attributes, sign)] = -1 if sign == "-" else 1
        return self._without_rivals(found) if signed else found

    def _without_rivals(self, signs: list[int]) -> list[int]:
        """What is set takes the place of what excludes it."""
        for group in self.exclusive:
            places = [self.attributes.index(name) for name in group]
            wanted = [k for k in places if signs[k] > 0]
            if len(wanted) > 1:
                one, other = (f"+{self.attributes[k]}" for k in wanted[:2])
                problem = f"an image has one at most of {', '.join(group)}"
                raise UserError("attributes", f"{one},{other}", problem, _typed("attributes", one))
            if wanted:
                signs = [-1 if k in places and k not in wanted else sign for k, sign in enumerate(signs)]
        return signs

    def written(self, signs: list[int]) -> list[str]:
        """Names of which `signs` makes the same signs."""
        return self._signed(signs) if 0 in signs else [self.attributes[k] for k, sign in enumerate(signs) if sign > 0]

    def _signed(self, signs: list[int]) -> list[str]:
        """Names with their signs; what goes since another comes that excludes it goes without saying."""
        told = {self.attributes[k]: sign for k, sign in enumerate(signs) if sign}
        there = {name for name, sign in told.items() if sign > 0}
        gone = {name for group in self.exclusive if there & {*group} for name in group} - there
        return [f"{'+' if sign > 0 else '-'}{name}" for name, sign in told.items() if name not in gone]

    def asked(self, batch: Batch, needs: Collection[str], signs: list[int] | None = None) -> list[str] | None:
        """What each image is to show, of the Batch fields that a model needs; None where none of these has names.

        That is its label, how its attributes are to change, or those that it has.

        Args:
            batch: Batch fields of the images.
            needs: names of those that the model needs.
            signs: 1, -1 or 0 for each attribute (`signs`), told beside a label; None: nothing was asked.
        """
        own, target = (batch[name].tolist() if name in batch else None for name in ("attributes", "target"))
        if "target" in needs and target is not None:
            if own is None:
                return [self._having(row) for row in target]
            changes = [[int(b - a) for a, b in zip(*pair, strict=True)] for pair in zip(own, target, strict=True)]
            return [" ".join(self._signed(change)) for change in changes]
        if "label" in needs and "label" in batch:
            beside = self._signed(signs or [])
            return [" ".join([str(self.called(label)), *beside]) for label in batch["label"].tolist()]
        return [self._having(row) for row in own] if "attributes" in needs and own is not None else None

    def _having(self, row: list[float]) -> str:
        return " ".join(name for name, there in zip(self.attributes, row, strict=True) if there)

    def lines(self) -> dict[str, str]:
        """Option of sample.py -> the names that it takes; labels with their numbers."""
        said = {"label": ", ".join(f"{k} {name}" for k, name in enumerate(self.labels))}
        return {key: text for key, text in (said | {"attributes": ", ".join(self.attributes)}).items() if text}


def _number(key: str, typed: str, known: list[str], sign: str = "") -> int:
    """The number of a name; upper and lower case, and _ for a space, count only where names differ in them alone."""
    if typed in known:
        return known.index(typed)
    alike = [k for k, name in enumerate(known) if _plain(name) == _plain(typed)]
    if len(alike) == 1:
        return alike[0]
    meant = [known[k] for k in alike] or known
    close = meant[0] if alike else nearest(typed, known) or known[0]
    raise UserError(key, sign + typed, f"the set has {', '.join(meant)}", _typed(key, sign + close))


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _typed(key: str, name: str) -> str:
    """`key=name` as it is typed: in quotes for Hydra only where the name would be taken for several."""
    return word(key, name) if re.search(r"[,\[\]\"'\\]", name) else shell(f"{key}={name}")
