"""From the records of an evaluation to its figures, all at once and in the order of the data set."""

import collections
import dataclasses
import hashlib

import numpy as np

from fcvit.errors import BadImages
from fcvit.evaluation import results
from fcvit.evaluation.journal import Frame, Journal
from fcvit.evaluation.protocols import stand
from fcvit.evaluation.results import EFFECTS, Agreement, Effect, Real, Records, Result
from fcvit.evaluation.settings import Lane, Plan
from fcvit.metrics import classification as metrics


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the records say.

    Attributes:
        results, records: one for each lane.
        agreements, effects: of engines; of protocols and precisions.
        left_out: name and reason of each image that could not be read.
    """

    results: tuple[Result, ...]
    records: tuple[Records, ...]
    agreements: tuple[Agreement, ...]
    effects: tuple[Effect, ...]
    left_out: tuple[tuple[str, str], ...]


def figures(plan: Plan, journal: Journal) -> Figures:
    """All figures of a journal that has every batch.

    Raises:
        BadImages: not a single image could be read.
    """
    frames = [journal.frames[number] for number in plan.batches]
    left_out = []
    for index, reason in (bad for frame in frames for bad in frame.extra["bad"]):
        name = plan.images.names[index]
        left_out.append((name, reason.removeprefix(f"{name}: ")))
    rows = np.concatenate([frame.records for frame in frames])
    if not len(rows):
        first = ": ".join(left_out[0])
        raise BadImages(f"{plan.images.root}: none of {len(plan.images)} images can be read, first: {first}")
    records = _records(plan, rows)
    found = [_result(plan, place, frames, rows, kept, len(left_out)) for place, kept in enumerate(records)]
    return Figures(
        tuple(found), tuple(records), tuple(_agreements(plan, rows)), tuple(_effects(plan, records)), tuple(left_out)
    )


def _records(plan: Plan, rows: np.ndarray) -> list[Records]:
    names = tuple(plan.images.names[index] for index in rows["index"])
    digests = tuple(digest.tobytes().hex() for digest in rows["digest"])
    truth = plan.labels[rows["index"]]
    return [
        Records(names, digests, truth, part["rank"], part["loss"], part["top"], part["probability"], plan.lane_classes)
        for part in (rows["lanes"][:, place] for place in range(len(plan.lanes)))
    ]


def _result(plan: Plan, place: int, frames: list[Frame], rows: np.ndarray, records: Records, left_out: int) -> Result:
    lane = plan.lanes[place]
    count = len(rows)
    right, in_k = int(records.correct.sum()), int((records.rank < plan.k).sum())
    top1, interval = metrics.share(right, count), metrics.wilson(right, count)
    return Result(
        name=lane.name,
        weights=str(lane.weights.source.path),
        weights_sha256=lane.weights.source.sha256,
        network=str(lane.weights.spec),
        engine=lane.engine_name,
        device=", ".join(sorted({frame.extra["devices"][place] for frame in frames if len(frame.records)})),
        precision=lane.precision,
        batch_size=int(plan.settings.batch_size),
        protocol=lane.protocol,
        images=count,
        unreadable=left_out,
        classes=len(plan.columns),
        top1=top1,
        top_k=metrics.share(in_k, count),
        k=plan.k,
        top1_interval=interval,
        top_k_interval=metrics.wilson(in_k, count),
        loss=float(records.loss.mean()),
        calibration=metrics.calibration(records.probability[:, 0], records.correct),
        real=_real(plan, rows, records),
        standing=stand(
            lane.weights.spec.variant,
            len(plan.columns),
            lane.protocol,
            plan.validation,
            top1,
            interval,
            count,
            left_out,
        ),
        per_class=results.class_figures(records, plan.k),
        fingerprint=_fingerprint(records),
        hint=_hint(plan, records),
        seconds=sum(frame.extra["seconds"][place] for frame in frames),
    )


def _real(plan: Plan, rows: np.ndarray, records: Records) -> Real | None:
    if plan.real is None:
        return None
    best = plan.columns[records.top[:, 0]]
    answers = [plan.real[index] for index in rows["index"]]
    hits = [int(guess) in answer for guess, answer in zip(best, answers, strict=True) if answer]
    return Real(len(hits), metrics.share(sum(hits), len(hits)), metrics.wilson(sum(hits), len(hits)))


def _fingerprint(records: Records) -> str:
    """SHA-256 over contents and classes, whatever the names and the order."""
    ids = [records.classes[label].id for label in records.truth]
    pairs = sorted(f"{digest} {name}" for digest, name in zip(records.digests, ids, strict=True))
    return hashlib.sha256("\n".join(pairs).encode("utf-8", "surrogatepass")).hexdigest()


def _hint(plan: Plan, records: Records) -> str:
    """Say that the classes look permuted, and which."""
    order = metrics.other_order(plan.columns[records.truth], plan.columns[records.top[:, 0]])
    if order is None:
        return ""
    named = [f"{plan.classes[true].id[:40]} as {plan.classes[answer].id[:40]}" for true, answer in order.moved.items()]
    some = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
    if not order.all:
        return (
            f"{len(order.moved)} classes look permuted: {order.explained:.0f} % of their images are taken for another "
            f"one of them ({some}); are they in the model's order?"
        )
    steps = collections.Counter(answer - true for true, answer in order.moved.items())
    step, times = steps.most_common(1)[0]
    shift = {-1: "do the labels count from 1? ", 1: "are the labels one too low? "}.get(step, "")
    return (
        f"the classes look permuted: one other order of them explains {order.explained:.0f} % of the answers ({some}); "
        f"{shift if times > 0.8 * len(named) else ''}name the model's classes, in its order, with --classes FILE, or "
        "mend the labels"
    )


def _agreements(plan: Plan, rows: np.ndarray) -> list[Agreement]:
    """Each further engine beside the first one of its weights and protocol."""
    found = []
    for place, lane in enumerate(plan.lanes):
        if lane.reference is None:
            continue
        part, other = rows["lanes"][:, place], rows["lanes"][:, lane.reference]
        reference = plan.lanes[lane.reference]
        found.append(
            Agreement(
                (reference.name, lane.name),
                (_computed(plan, reference), _computed(plan, lane)),
                metrics.share(int((part["top"][:, 0] == other["top"][:, 0]).sum()), len(rows)),
                float(part["largest"].max()),
                float(part["total"].sum() / (len(rows) * len(plan.columns))),
            )
        )
    return found


def _computed(plan: Plan, lane: Lane) -> str:
    """The engine, with the precision where there are several."""
    return lane.engine_name if len(plan.precisions) == 1 else f"{lane.engine_name} ({lane.precision})"


def _effects(plan: Plan, records: list[Records]) -> list[Effect]:
    """The later lane less the earlier, where the protocol or the precision is all that differs."""
    found = []
    for place, lane in enumerate(plan.lanes):
        for before, earlier in enumerate(plan.lanes[:place]):
            if (id(earlier.weights), earlier.engine_name) != (id(lane.weights), lane.engine_name):
                continue
            differing = [what for what in EFFECTS if getattr(earlier, what) != getattr(lane, what)]
            if len(differing) == 1:
                paired = metrics.paired(records[before].correct, records[place].correct)
                names = (earlier.name, lane.name)
                found.append(Effect(differing[0], names, paired.difference, paired.interval, paired.p_value))
    return found
