"""llama.cpp on the same GGUF file, in a process of its own whose interpreter has the package `llama-cpp-python`.

It is no dependency of Umbel: `python -m bench.decode --llama-cpp PYTHON` names an interpreter that has it, and that one
runs this very file, which imports nothing else.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType


class LlamaCppProcess:
    """Decodes greedily with llama.cpp, as often as it is asked to."""

    def __init__(self, python: str, model: str, threads: int) -> None:
        """Start the process. Raises RuntimeError if it cannot load the package or the model."""
        self._process = subprocess.Popen(
            [python, __file__, model, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = self._line()
        if "version" not in ready:
            raise RuntimeError(f"{python} cannot run llama.cpp: {ready.get('error', 'it ended')}")
        self.version = str(ready["version"])

    def token_s(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Return the seconds per token of `num_tokens` after the prompt and its first token."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return float(str(self._line()["token_s"]))

    def _line(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, object] = json.loads(line) if line else {}
        return found

    def __enter__(self) -> "LlamaCppProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(model: str, threads: int) -> None:
    """What the other interpreter does: a line of JSON for each line of JSON."""
    try:
        import llama_cpp
        import numpy

        llama = llama_cpp.Llama(
            model_path=model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _say({"error": str(error)})
        return
    size = llama.n_vocab()
    _say({"version": llama_cpp.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        llama.reset()
        tokens, started_s = request["prompt"], 0.0
        for count in range(request["tokens"] + 1):
            llama.eval(tokens)
            # The logits as the library has them: its own sampling copies them several times.
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1), shape=(size,))
            tokens = [int(logits.argmax())]
            if count == 0:
                started_s = time.perf_counter()
        _say({"token_s": (time.perf_counter() - started_s) / request["tokens"]})


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
