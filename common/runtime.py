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
        graph: ONNX, with an input ``image`` and an output ``features``.
        objects: the folder of its numbers, where they are not inside.
        threads: 0: as many as there are cores.

    Raises:
        ModelError: it cannot be run here; says why.
    """

    def __init__(self, graph: bytes, objects: Path | None = None, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
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

    def features(self, images: Floats) -> Floats:
        """Images (N, 3, S, S), normalised -> features (N, C); raises ModelError."""
        try:
            return cast(Floats, self._session.run([OUTPUT], {INPUT: images})[0])
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime failed: {str(error)[:200]}") from error
