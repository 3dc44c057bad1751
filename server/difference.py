"""What changed from one version to another, in words."""

from collections.abc import Iterator
from statistics import fmean

from common.manifest import Manifest


def difference(before: Manifest, after: Manifest) -> list[str]:
    """Lines that a person reads: units by block, cost, accuracy by farm, bytes to fetch."""
    lines = [
        f"version {after.counter} (run {after.run}, round {after.round}) against "
        f"version {before.counter} (run {before.run}, round {before.round})"
    ]
    if (before.spec.name, before.spec.image_size) != (after.spec.name, after.spec.image_size):
        lines.append(
            f"another architecture: {before.spec.name} at {before.spec.image_size} px, now "
            f"{after.spec.name} at {after.spec.image_size} px"
        )
    else:
        lines += _units(before, after)
    lines += [
        _count("MACs", before.macs, after.macs),
        _count("parameters", before.params, after.params),
        *_accuracy(before, after),
    ]
    held = before.weights
    fetched = sum(size for digest, size in after.weights.items() if digest not in held)
    whole = sum(after.weights.values())
    lines.append(f"to fetch: {fetched / 1e6:.2f} MB of {whole / 1e6:.2f} MB")
    return lines


def _units(before: Manifest, after: Manifest) -> Iterator[str]:
    if (before.spec.heads, before.spec.neurons) == (after.spec.heads, after.spec.neurons):
        yield "the same heads and neurons"
        return
    pairs = zip(
        *(before.spec.heads, after.spec.heads, before.spec.neurons, after.spec.neurons),
        strict=True,
    )
    for block, (heads, heads_now, neurons, neurons_now) in enumerate(pairs):
        said = [
            f"{was} to {now} {unit}"
            for was, now, unit in ((heads, heads_now, "heads"), (neurons, neurons_now, "neurons"))
            if was != now
        ]
        if said:
            yield f"block {block}: " + ", ".join(said)


def _count(what: str, before: int, after: int) -> str:
    if before == after:
        return f"{what}: {after / 1e6:.1f} million, as before"
    change = 100 * (after / before - 1)
    return f"{what}: {before / 1e6:.1f} to {after / 1e6:.1f} million ({change:+.1f} %)"


def _accuracy(before: Manifest, after: Manifest) -> Iterator[str]:
    both = sorted(before.farms.keys() & after.farms.keys())
    same = [farm for farm in both if before.farms[farm].part == after.farms[farm].part]
    for farm in same:
        was, now = before.farms[farm], after.farms[farm]
        yield (
            f"accuracy of {farm} ({now.part} part, {now.examples} images): {was.accuracy:.3f} to "
            f"{now.accuracy:.3f}"
        )
    if same:
        change = fmean(after.farms[farm].accuracy - before.farms[farm].accuracy for farm in same)
        yield f"accuracy, mean over {len(same)} farms: {100 * change:+.1f} points"
    else:
        yield "accuracy: no farm has evaluated both on the same images"
