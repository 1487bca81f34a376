"""Methods by name: what the teacher goes through first, and what the student learns from it (no torch).

    ce          no teacher: cross-entropy on the labels
    ofd         the student trusts the teacher: feature distillation (Heo et al., 2019)
    kd          ... logit distillation (Hinton et al., 2015)
    at          ... attention transfer (Zagoruyko and Komodakis, 2017)
    robustkd    harden the student; where a mask is asked for, detoxify the teacher's features (Chen et al., 2024)
    finetune    fine-tune the teacher on the clean images first
    prune       ... prune dormant channels of its last stage, then fine-tune: fine-pruning (Liu et al., 2018)
    nad         ... fine-tune under the attention of a fine-tuned copy: neural attention distillation (Li et al., 2021)
    anp         ... adversarial neuron pruning (Wu and Wang, 2021)

The last five go with +ofd, +kd or +at, and alone stand for themselves with ofd: `robustkd` is `robustkd+ofd`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rkd.errors import ConfigError

OBJECTIVES = ("ofd", "kd", "at")
TREATMENTS = ("robustkd", "finetune", "prune", "nad", "anp")
METHODS = ("ce", *OBJECTIVES, *(f"{treatment}+{objective}" for treatment in TREATMENTS for objective in OBJECTIVES))

_SHORT = {"ofd": "OFD", "kd": "logit KD", "at": "AT"}
PURIFIED = {  # what a purified teacher is called in tables, by its purifier
    "finetune": "fine-tuned teacher",
    "prune": "fine-pruned teacher",
    "nad": "teacher purified by NAD",
    "anp": "teacher purified by ANP",
}


@dataclass(frozen=True)
class Method:
    """A method, taken apart.

    Attributes:
        treatment: of the teacher: one of `TREATMENTS`, or empty.
        objective: of the student: one of `OBJECTIVES`, or `ce`.
    """

    treatment: str
    objective: str

    @classmethod
    def parse(cls, name: str) -> Method:
        """From its name; `parse(str(method)) == method`.

        Raises:
            ConfigError: there is no such method.
        """
        if name == "ce" or name in OBJECTIVES:
            return cls("", name)
        treatment, plus, objective = name.partition("+")
        if treatment in TREATMENTS and (not plus or objective in OBJECTIVES):
            return cls(treatment, objective or "ofd")
        close = difflib.get_close_matches(name, [*METHODS, *TREATMENTS], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--method {name!r}: expected ce, {', '.join(OBJECTIVES)}, or one of {', '.join(TREATMENTS)} with +ofd, +kd "
            f"or +at{hint}"
        )

    def __str__(self) -> str:
        if not self.treatment:
            return self.objective
        return "robustkd" if self == Method("robustkd", "ofd") else f"{self.treatment}+{self.objective}"

    @property
    def purifier(self) -> str | None:
        """What changes the teacher's weights before the student sees it, by the method's name alone."""
        return self.treatment if self.treatment in PURIFIED else None

    def role(self, *, hardened: bool, labels: bool = True) -> str:
        """What the student is called in tables."""
        without = "" if labels else ", without labels"
        if self.objective == "ce":
            name = "student without teacher (CE)" if labels else "student of the teacher's answers (CE, without labels)"
            return f"hardened {name}" if hardened else name
        short = _SHORT[self.objective] + without
        if self.treatment == "robustkd":
            name = "RobustKD student" if (self.objective, labels) == ("ofd", True) else f"RobustKD student ({short})"
            return name if hardened else f"{name} (paper's form)"
        if self.treatment:
            name = f"student of the {PURIFIED[self.treatment]} ({short})"
            return f"hardened {name}" if hardened else name
        return f"{'hardened' if hardened else 'undefended'} student ({short})"
