"""From what a farm's trainer serves with to one file for its devices without torch."""

from pathlib import Path

from client.serving import Bundle, Serving
from common.errors import StateError
from common.export import graph_of, require_parity, whole
from common.portable import PortableAbout, PortableBundle
from common.runtime import Runtime


def portable(bundle: Bundle, serving: Serving) -> PortableBundle:
    """A bundle as ONNX and numbers.

    Raises:
        ModelError: the backbone cannot be written as ONNX, or does something else there.
    """
    about, spec = bundle.about, bundle.about.manifest.spec
    objects = serving.objects.folder
    graph = whole(graph_of(bundle.model, spec, about.manifest.tensors), objects)
    require_parity(bundle.model, spec, Runtime(graph))
    return PortableBundle(
        PortableAbout(
            version=about.manifest.counter,
            spec=spec,
            classes=about.classes,
            temperature=about.temperature,
            threshold=about.threshold,
        ),
        graph,
        bundle.classifier.weight.detach().numpy(),
        bundle.classifier.bias.detach().numpy(),
    )


def write_portable(serving: Serving, out: Path) -> PortableAbout:
    """Write what a device serves with to a file.

    Raises:
        StateError: it serves with nothing yet.
        ModelError: as :func:`portable` does.
        DiskError: the disk is full.
    """
    bundle = serving.current()
    if bundle is None:
        raise StateError("no version is in use; get one with: fieldfed-client update")
    made = portable(bundle, serving)
    made.write(out)
    return made.about
