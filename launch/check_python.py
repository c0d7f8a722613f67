"""What make asks before it makes an environment: whether this Python can. Written for old Pythons,
too.
"""

import sys

OLDEST = (3, 11)
TOO_OLD = (
    "Python 3.11 or newer is needed, {} is {}.{}: name a newer one, as in make train "
    "PYTHON=python3.12"
)
NO_VENV = (
    "{} cannot make environments: apt-get install python{}.{}-venv, or name another by PYTHON="
)


def problem():
    """One line of what is missing and what to do; empty where nothing is."""
    told = (sys.executable, sys.version_info[0], sys.version_info[1])
    if sys.version_info[:2] < OLDEST:
        return TOO_OLD.format(*told)
    try:  # Debian and Ubuntu leave them out of python3
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return NO_VENV.format(*told)
    return ""


if __name__ == "__main__":
    sys.exit(problem() or 0)
