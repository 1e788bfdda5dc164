"""`p3d verify --recompute`: what is asked for, and what is said about the answer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from p3d.jobs.cli import output
from p3d.jobs.cli.progress import show_count

if TYPE_CHECKING:
    from p3d.jobs.monitor.recompute import Given, Recomputed, RowFound
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.sources.below import SourceRule
    from p3d.pipeline.storage.store import Store, StoreOptions

NAMED = 10  # rows of a kind that are named
MADE = 2  # differences of a wrong row that are named
UNSEEN = (
    "A comparison by cosine cannot see what changes a vector less than another machine does: last bits, or the vector "
    "of a clip that looks the same"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a recomputation."""

    n_drawn: int
    seed: int
    source: str | None
    weights: str | None


def allowed(
    out: str, store: Store, job: JobRecord, asked: Asked, s3: StoreOptions, trust: bool
) -> tuple[SourceRule, StoreOptions, bool]:
    """Which source videos may be opened, with which store options, and whether OUT is trusted.

    Untrusted if it is not, and no --source says what may be opened.
    """
    from p3d.jobs.trust import is_trusted, need_trust
    from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule, absolute

    rule = EVERY_SOURCE if asked.source is None else SourceRule(absolute(asked.source))
    trusted = trust or is_trusted(store, job)
    if trusted or asked.source is None:
        otherwise = (
            f"`p3d verify {store.words(out)} --recompute {asked.n_drawn} --source ROOT` opens only videos below ROOT"
        )
        s3 = need_trust(store, job, s3, trust_it=trust, verb="verify --recompute", say=output.say, otherwise=otherwise)
    return rule, s3, trusted


def weights_for(store: Store, job: JobRecord, asked: Asked, s3: StoreOptions) -> Given:
    """The weights to embed with, loaded before anything else takes time. InputError."""
    from p3d.jobs.monitor.recompute import given_weights

    output.say("loading the network ...")
    return given_weights(store, job.recipe, asked.weights, s3)


def recomputed(
    store: Store, job: JobRecord, asked: Asked, given: Given, rule: SourceRule, s3: StoreOptions, quiet: bool
) -> Recomputed:
    """Draw, compute and compare, with a progress bar unless `quiet`."""
    from p3d.jobs.monitor.recompute import recompute
    from p3d.pipeline.dataset.newest_rows import NewestRows

    source = NewestRows(store, job)
    with nullcontext(lambda *_: None) if quiet else show_count("clip") as on_clips:
        return recompute(source, asked.n_drawn, seed=asked.seed, rule=rule, given=given, s3=s3, on_clips=on_clips)


def record(found: Recomputed) -> dict[str, Any]:
    """The answer as a JSON record. Rows that agree are only counted."""
    return {
        "seed": found.seed,
        "rows": found.n_rows,
        "drawn": len(found.rows),
        "bits": len(found.of("bits")),
        "cosine": len(found.of("cosine")),
        "wrong": len(found.of("wrong")),
        "unchecked": len(found.of("unchecked")),
        "most_wrong": found.most_wrong,
        "of": found.n_rows,
        "share_wrong": found.share_wrong,
        "confidence": 0.95,
        "otherwise": found.otherwise,
        "weights": {
            "sha256": found.weights_sha256,
            "from_out": found.weights_from_out,
            "as_recipe": found.weights_as_recipe,
        },
        "wrong_rows": [asdict(row) for row in found.of("wrong")],
        "unchecked_rows": [asdict(row) for row in found.of("unchecked")],
    }


def tell(found: Recomputed, asked: Asked, trusted: bool) -> None:
    """Print the answer: how many agree, what that says about all rows, and each row that differs."""
    n = {how: len(found.of(how)) for how in ("bits", "cosine", "wrong", "unchecked")}
    output.show(
        f"computed again: {len(found.rows)} of {output.count(found.n_rows, 'clip')}, drawn with --seed {found.seed}",
        *output.table(
            [("bit for bit", "by cosine", "wrong", "not checked"), tuple(map(str, n.values()))], right=(0, 1, 2, 3)
        ),
    )
    if not found.weights_as_recipe:
        output.say(f"these are not the weights of the recipe: the sha256 of {asked.weights} is {found.weights_sha256}")
    _name("wrong", found.of("wrong"))
    _name("not checked", found.of("unchecked"))
    if found.n_checked > 1 and n["wrong"] == found.n_checked:
        why = "" if found.weights_as_recipe else ", as with other weights"
        output.say(f"every row that was checked is wrong{why}")
    if n["cosine"]:
        _tell_why(found.otherwise)
    if not found.n_checked:
        output.say("no row could be checked")
        return
    most, share = f"{found.most_wrong} of {output.count(found.n_rows, 'row')}", found.most_wrong / found.n_rows
    if n["unchecked"]:
        output.say(f"with 95 % confidence, at most {found.share_wrong:.2%} of the rows that can be checked are wrong")
        output.say(f"with 95 % confidence, at most {most} are wrong or cannot be checked ({share:.2%})")
    else:
        output.say(f"with 95 % confidence, at most {most} are wrong ({share:.2%})")
    if n["wrong"]:
        output.say(
            "the files of OUT may agree with each other, so --repair cannot help: get the wrong rows again from who "
            "made them, or embed these videos into another output"
        )
    if found.weights_from_out and n["wrong"] < found.n_checked:
        chosen = "" if trusted else ", which the maker of OUT chose"
        others = f"the other {output.count(found.n_checked - n['wrong'], 'row')} are " if n["wrong"] else ""
        output.say(f"{others}consistent with the weights in OUT{chosen}; --weights FILE compares with your own")
    elif found.weights_as_recipe and not found.weights_from_out:
        output.say(f"{asked.weights} has the weights of the recipe")
    if not trusted and found.seed == 0:
        output.say("the maker of OUT could know which rows --seed 0 draws; choose another seed")


def _tell_why(otherwise: dict[str, int]) -> None:
    """Say what a comparison by cosine cannot see, and why there was one."""
    output.say(UNSEEN)
    output.say(
        "compared by cosine because of:" if otherwise else "compared by cosine: the processor may be another one"
    )
    for why, count in sorted(otherwise.items(), key=lambda item: -item[1])[:NAMED]:
        output.say(f"  {why} ({output.count(count, 'row')})")


def _name(what: str, rows: list[RowFound]) -> None:
    """Name rows, those of one video with the same cause in one line."""
    alike: dict[tuple[str, str, str], list[RowFound]] = {}
    for row in rows:
        made = f" ({', '.join(row.made[:MADE])})" if row.how == "wrong" and row.made else ""
        alike.setdefault((row.path, row.shard, f"{row.cause}{made}"), []).append(row)
    shown = list(alike.items())[:NAMED]
    for (path, shard, why), same in shown:
        clips = ", ".join(str(row.clip_index) for row in same[:NAMED]) + (" ..." if len(same) > NAMED else "")
        output.say(f"{what}: {path} clip{'s' if len(same) > 1 else ''} {clips} ({shard}): {why}")
    if more := len(rows) - sum(len(same) for _, same in shown):
        output.say(f"{what}: {more} more; --json lists all")
