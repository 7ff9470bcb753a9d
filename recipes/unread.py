"""Settings that a command line names and its run would not read: they contradict another setting.

A recipe may set what a run does not need; a user who types it expects an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from latefusion.recipes.schema import (
    QUESTION_SETS,
    EntryInit,
    EntryKind,
    Scheduler,
    Source,
    Teacher,
    Trust,
    Tune,
)

NOTHING = ("null", "", "[]", "{}")  # values that take a setting back
OFFERS = ("schedule", "pyramid", "cross", "teacher")  # keys of `model` that recipes take settings from
SETS = "data=scenes, icons or easy_vqa"


def check_read(words: Sequence[str], tree: DictConfig) -> None:
    """Raise ValueError if the run would not read a setting of the command line.

    Args:
        words: `key=value`, as Hydra takes them.
        tree: the configuration that they compose.
    """
    for word in words:
        word = word.lstrip("+")
        key, _, value = word.partition("=")
        if word.startswith("~") or value in NOTHING:
            continue
        for keys, reason in RULES:
            if any(key == name or key.startswith(f"{name}.") for name in keys) and (why := reason(tree, key)):
                raise ValueError(f"{word} would not be read: {why}.")


def _schedule(tree: Any, key: str) -> str:
    profile, auto = tree.schedule.profile, tree.schedule.auto
    if not auto and profile is None:
        return ""
    which = "schedule=auto" if profile is None else f"schedule.profile={profile}"
    return f"{which} takes the schedule from a profile; leave one of the two out"


def _profiling(tree: Any, key: str) -> str:
    profile = tree.schedule.profile
    if profile is not None:
        return f"the profile in schedule.profile={profile} was made before; leave one of the two out"
    return "" if tree.schedule.auto else "no profile is made; add schedule=auto, or leave it out"


def _narrowing(tree: Any, key: str) -> str:
    schedule = tree.schedule
    banded = schedule.enter or schedule.exit is not None or schedule.keep or schedule.cross is not None
    if tree.train.narrow == 0 or banded or schedule.auto or schedule.profile is not None:
        return ""
    return (
        "the schedule is dense from the first step on; set schedule.enter and schedule.exit, or leave it out"
    )


def _offer(tree: Any, key: str) -> str:
    """Of what a model offers, a recipe takes one; `schedule=auto` compares its profile with `model.schedule`."""
    name = key.split(".")[1]
    values: Any = OmegaConf.to_container(tree, resolve=False)
    offers = {offer: str(values["model"].pop(offer)) for offer in OFFERS}
    read = str(values) + ("${model.schedule}" if tree.schedule.auto else "")
    read += offers["pyramid"] if "${model.pyramid" in read else ""
    if f"${{model.{name}" in read:
        return ""
    return f"this recipe takes nothing from model.{name}; set {'teacher' if name == 'teacher' else 'schedule'} itself"


def _path(tree: Any, key: str) -> str:
    source = tree.data.source
    if source is Source.mixture:
        return "data=mixture reads data.parts; put it there, as 'data.parts=[{path: PATH}]'"
    return f"data={source.value} reads no file; add data=dataset" if source in QUESTION_SETS else ""


def _parts(tree: Any, key: str) -> str:
    return "" if tree.data.source is Source.mixture else "only a mixture has parts; add data=mixture"


def _of_sets(tree: Any, key: str) -> str:
    data = tree.data
    changed = {
        "data.scenes": data.scenes is not None,
        "data.turns": data.turns != 1,
        "data.noise": data.noise,
    }
    return "" if data.source in QUESTION_SETS or not changed[key] else f"it is for {SETS}; leave it out"


def _buffer(tree: Any, key: str) -> str:
    return "" if tree.data.streaming else "it is for data.streaming=true"


def _split(tree: Any, key: str) -> str:
    if tree.data.source is Source.mixture:
        return (
            "each part of a mixture has its own; put it there, as 'data.parts=[{path: PATH, split: SPLIT}]'"
        )
    return ""


def _drawn(tree: Any, key: str) -> str:
    data = tree.data
    if data.source in (Source.dataset, Source.llava) and not data.streaming:
        return "it draws question sets, mixtures and streams, which these data are none of; leave it out"
    return ""


def _frames(tree: Any, key: str) -> str:
    data = tree.data
    none = data.source in QUESTION_SETS and data.eval_path is None
    return f"data={data.source.value} has no videos; leave it out" if none else ""


def _evaluation(tree: Any, key: str) -> str:
    """`training/run.py` evaluates what has questions, against a base that is still there."""
    if not tree.eval.enabled:
        return "eval.enabled=false asks no questions; leave one of the two out"
    if tree.tune is Tune.full:
        return "tune=full leaves no base to compare with, so nothing is evaluated; leave it out"
    if tree.data.eval_path is None and tree.data.source not in QUESTION_SETS:
        return "these data have no questions of their own; add data.eval_path=QUESTIONS"
    return ""


def _teacher(tree: Any, key: str) -> str:
    if tree.teacher is Teacher.none and (key != "kl.weight" or tree.kl.weight > 0):
        return "teacher=none has no answers to learn from; choose teacher=visipruner or dense"
    # recipes/check.py explains the other two
    weightless = tree.kl.weight == 0 and key not in ("kl.weight", "kl.model")
    return "kl.weight=0 leaves the teacher out; leave one of the two out" if weightless else ""


def _trust(tree: Any, key: str) -> str:
    return _teacher(tree, key) if tree.kl.trust is Trust.all else ""


def _other_teacher(tree: Any, key: str) -> str:
    return "" if tree.kl.model is not None else "it is about another model as the teacher; add kl.model=PATH"


def _cache(tree: Any, key: str) -> str:
    return (
        "" if tree.kl.cache is not None else "it is for answers that are written before; add kl.cache=FOLDER"
    )


def _lora(tree: Any, key: str) -> str:
    tune = tree.tune
    return "" if tune is Tune.lora else f"tune={tune.value} trains no LoRA; leave one of the two out"


def _projector(tree: Any, key: str) -> str:
    tune = tree.tune
    return "" if tune is Tune.lora else f"tune={tune.value} trains the projector in any case; leave it out"


def _ranking(tree: Any, key: str) -> str:
    unranked = not (tree.schedule.keep or _schedule(tree, key))
    return (
        "the schedule ranks no tokens; add schedule.keep={LAYER: TOKENS}, or leave it out" if unranked else ""
    )


def _warmup(tree: Any, key: str) -> str:
    constant = tree.train.scheduler is Scheduler.constant and tree.train.warmup
    return "train.scheduler=constant has no warm-up; use constant_with_warmup" if constant else ""


def _prefetch(tree: Any, key: str) -> str:
    return "" if tree.train.workers else "it is for workers that load ahead; add train.workers=N"


def _too_long(tree: Any, key: str) -> str:
    return "" if tree.data.max_length else "no sample is too long without data.max_length=N; add it"


def _cross(tree: Any) -> Sequence[Any]:
    """The layers of `schedule.cross`; none where there are none, or where it is no list, which is refused later."""
    cross = tree.schedule.cross
    return cross if isinstance(cross, ListConfig) else ()


def _maps(tree: Any) -> bool:
    """Whether several layers read frozen tokens, or a profile will say which."""
    schedule = tree.schedule
    chosen = schedule.cross is not None and (schedule.auto or schedule.profile is not None)
    return chosen or len(_cross(tree)) > 1


def _no_entry(tree: Any) -> str:
    """Why the run has no entry adapter; empty: it has one, or a profile will say."""
    schedule, entry = tree.schedule, tree.entry
    if entry.kind is EntryKind.none:
        return "entry.kind=none has no entry adapter; leave one of the two out"
    if schedule.auto or schedule.profile is not None:
        return ""
    at_once = schedule.enter == 0 if schedule.cross is None else 0 in _cross(tree)
    return "vision tokens enter at layer 0, where no entry adapter stands; leave it out" if at_once else ""


def _entry(tree: Any, key: str) -> str:
    entry = tree.entry
    if key == "entry.init" and entry.init is EntryInit.identity:
        return ""
    scale = entry.kind is EntryKind.scale and key == "entry.rank"
    return _no_entry(tree) or ("entry.kind=scale has no rank; leave one of the two out" if scale else "")


def _kind(tree: Any, key: str) -> str:
    return "" if tree.entry.kind is EntryKind.none else _no_entry(tree)


def _images(tree: Any, key: str) -> str:
    if tree.schedule.auto and tree.schedule.profile is None:  # the profile fits entries, too
        return ""
    identity = tree.entry.init is EntryInit.identity
    fix = "entry.init=identity calibrates nothing; add entry.init=calibrated, or leave it out"
    return _no_entry(tree) or (fix if identity else "")


def _later(tree: Any, key: str) -> str:
    entry = tree.entry
    if why := _no_entry(tree):
        return why
    if entry.init is EntryInit.identity:
        return "entry.init=identity calibrates nothing; add entry.init=calibrated, or leave it out"
    if not _maps(tree):
        return "it is for frozen tokens that several layers read (schedule.cross); leave it out"
    return ""


def _later_rank(tree: Any, key: str) -> str:
    entry = tree.entry
    if tree.schedule.cross is not None and (why := _no_entry(tree)):
        return why
    fits = entry.later and entry.init is EntryInit.calibrated
    if fits and _maps(tree):
        return ""
    return "it is of the maps of frozen vision tokens; choose recipe=cross_only entry.init=calibrated entry.later=true"


Reason = Callable[[Any, str], str]
RULES: tuple[tuple[Sequence[str], Reason], ...] = (  # keys, and why a run does not read them; empty: it does
    (
        (
            "schedule.enter",
            "schedule.exit",
            "schedule.keep",
            "schedule.ranking",
            "schedule.cross",
            "model.cross",
        ),
        _schedule,
    ),
    (("schedule.samples", "schedule.confirm", "schedule.bound", "schedule.budget"), _profiling),
    (("schedule.ranking",), _ranking),
    (("train.narrow",), _narrowing),
    (("train.warmup",), _warmup),
    (("train.prefetch",), _prefetch),
    (tuple(f"model.{offer}" for offer in OFFERS), _offer),
    (("data.path", "data.images"), _path),
    (("data.parts",), _parts),
    (("data.scenes", "data.turns", "data.noise"), _of_sets),
    (("data.split",), _split),
    (("data.seed",), _drawn),
    (("data.max_frames",), _frames),
    (("eval.split", "eval.samples", "eval.batch_size"), _evaluation),
    (("data.shuffle_buffer",), _buffer),
    (("data.too_long",), _too_long),
    (("kl.weight", "kl.temperature", "kl.share", "kl.top_k", "kl.model", "kl.visipruner"), _teacher),
    (("kl.trust",), _trust),
    (("kl.revision", "kl.visipruner"), _other_teacher),
    (("kl.top_k",), _cache),
    (tuple(f"lora.{n}" for n in ("variant", "layers", "r", "alpha", "dropout", "targets")), _lora),
    (("lora.train_projector",), _projector),
    (("entry.kind",), _kind),
    (("entry.rank", "entry.init"), _entry),
    (("entry.images",), _images),
    (("entry.later_rank",), _later_rank),
    (("entry.later",), _later),
)
