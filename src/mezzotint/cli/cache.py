"""``mezzotint cache``."""

from __future__ import annotations

from typing import Annotated

import typer

from mezzotint.cli.completion import complete_cache
from mezzotint.cli.options import Json
from mezzotint.cli.tables import Table, print_json, print_table
from mezzotint.errors import MezzotintError
from mezzotint.progress import console, results


def cache(
    action: Annotated[
        str | None,
        typer.Argument(
            metavar="clear",
            help="Remove what is kept. It is made again when it is next needed.",
            autocompletion=complete_cache,
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="Of one kind alone.", autocompletion=complete_cache)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is kept in the cache folder and how large it is, or clear it.

    The folder is $MEZZOTINT_CACHE, else mezzotint in the user's cache folder. Nothing outside of it is removed. What
    other libraries keep, such as weights from the Hugging Face hub, is theirs.
    """
    from mezzotint import cache as caching
    from mezzotint.files import cache_folder, readable_size

    if action not in (None, "clear"):
        raise MezzotintError(f"{action!r} is nothing to do with the cache; leave it out, or say 'clear'")
    removed, left = caching.clear(kind) if action else (caching.kept(), [])
    for sentence in left:
        console.print(sentence, soft_wrap=True)
    folder = cache_folder()
    place = str(folder) if folder == folder.resolve() else f"{folder} → {folder.resolve()}"
    if as_json:
        figures = {one: found._asdict() for one, found in removed.items()}
        return print_json({"folder": str(folder), "removed" if action else "kept": figures})
    rows = [(one, str(found.files), readable_size(found.bytes), caching.KINDS[one]) for one, found in removed.items()]
    total = caching.Kept(*map(sum, zip(*removed.values(), strict=True)))
    rows.append(("in all", str(total.files), readable_size(total.bytes), ""))
    results.print(f"{'removed from' if action else 'kept in'} {place}", soft_wrap=True)
    print_table(Table(["kind", "files", "size", "what it is"], rows, prose=True))
