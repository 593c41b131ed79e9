"""The command line: parse, call the library, print. Results go to standard output, the rest to standard error.

A file for each command; what several share is in `options`, `models` and `tables`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mezzotint.cli import (
    cache,
    convert,
    cost,
    denoise,
    encode,
    env,
    evaluate,
    export_vit,
    finetune,
    fit_tokenizer,
    probe,
    recipes,
    resume,
    sample,
    study,
    sweep,
    train,
    train_mae,
    usage,
)
from mezzotint.cli.app import app
from mezzotint.errors import MezzotintError, shortened
from mezzotint.progress import console, messages, print_anything

#: in the order and under the titles of --help
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (train.train, resume.resume, fit_tokenizer.fit_tokenizer, finetune.finetune, train_mae.train_mae),
    "Sample and score": (sample.sample, evaluate.evaluate, sweep.sweep, study.study),
    "Look inside": (probe.probe, denoise.denoise, cost.cost),
    "Weights and files": (encode.encode, convert.convert, export_vit.export_vit),
    "About": (recipes.recipes, env.env, cache.cache),
}
for title, commands in COMMANDS.items():
    for command in commands:
        app.command(command.__name__.replace("_", "-"), rich_help_panel=title)(command)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on standard error and exit code 2."""
    print_anything()
    try:
        with messages():
            sys.exit(app(prog_name="mezzotint", standalone_mode=False))
    except usage.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _fail(usage.sentence(error))
    except MezzotintError as error:
        _fail(str(error))
    except UnicodeEncodeError as error:
        _fail(f"{shortened(error.object)} is not in UTF-8, as a library that is used here needs it; rename it.")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.filename or 'file'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if "determine home directory" in str(error):  # pathlib's word for a ~ that means nothing
            _fail("a path begins with ~, and whose home that is is not known here; write it out.")
        if "DataLoader worker" in str(error):  # torch raises it wherever this process is when one dies
            _fail(
                f"a process that decodes images ended ({str(error).splitlines()[0]}), as the system ends one where "
                "memory is short; lower data.workers, and go on from the last checkpoint by 'mezzotint resume'."
            )
        if (device := _full(error)) is None:
            raise
        _fail(f"{device} is out of memory; lower training.batch_size or --batch-size, or raise training.accumulate.")


def _full(error: BaseException) -> str | None:
    """What has no memory left, where that is what the error says; importing torch to ask would slow down --help."""
    if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error):
        return "the GPU"
    return "the CPU" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else None


def _fail(sentence: str) -> None:
    console.print(f"error: {MezzotintError(sentence)}", soft_wrap=True)
    sys.exit(2)
