"""The machine: what it is, and whether it is ready for the course."""

import sys

try:
    from qlora_helpers.env.machine import (
        GATED,
        GIB,
        ROOT,
        TESTED,
        UNGATED,
        Profile,
        cache_dir,
        check_gib,
        check_name,
        check_whole,
        path,
        profile,
        profile_of,
        total_ram_gib,
        versions,
    )
    from qlora_helpers.env.readiness import (
        QUIET,
        keep_freed_memory,
        quiet,
        return_freed_memory,
        setup,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing in the Python of this kernel, {sys.executable}: "
        "choose the kernel of the course's .venv, or install requirements.txt in "
        "this Python",
        name=error.name,
    ) from error
