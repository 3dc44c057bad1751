"""A backbone in ONNX Runtime; nothing here needs torch."""

from pathlib import Path
from typing import cast

import onnxruntime

from common.errors import ModelError
from common.pixels import Floats

INPUT, OUTPUT = "image", "features"


class Runtime:
    """A graph that is ready to run.

    Args:
        graph: ONNX; its first input is images, its first output what it says of them.
        objects: the folder of its numbers, where they are not inside.
        threads: 0: as many as there are cores.
        settle: threads do not spin in wait of the next image, which would slow others down.

    Raises:
        ModelError: it cannot be run here; says why.
    """

    def __init__(
        self,
        graph: bytes,
        objects: Path | None = None,
        threads: int = 0,
        *,
        settle: bool = False,
    ) -> None:
        options = onnxruntime.SessionOptions()
        if settle:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if objects is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(objects.absolute())
            )
        try:
            self._session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises kinds of its own, undocumented
            raise ModelError(f"ONNX Runtime cannot run this: {str(error)[:200]}") from error
        first = self._session.get_inputs()[0]
        self._input, self._output = first.name, self._session.get_outputs()[0].name
        sides = first.shape[2:]
        self.side = sides[0] if len(sides) == 2 and isinstance(sides[0], int) else None
        """Of the images that it takes, in pixels; None where it takes any."""
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    def features(self, images: Floats) -> Floats:
        """Images (N, 3, S, S), normalised -> features (N, C); raises ModelError."""
        try:
            return cast(Floats, self._session.run([self._output], {self._input: images})[0])
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime failed: {str(error)[:200]}") from error
