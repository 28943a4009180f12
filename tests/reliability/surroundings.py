"""What users may lack: a home, or one that is a directory."""

import pwd


def no_home(patch, tmp_path):
    """A user that the system does not know, as in a container that runs with a number."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    patch.setattr(pwd, "getpwuid", unknown)
    _without(patch, "HOME", "ALPHAQ_CACHE", "XDG_CACHE_HOME")


def home_is_a_file(patch, tmp_path):
    """As where ``HOME`` is ``/dev/null``."""
    (tmp_path / "file").touch()
    _without(patch, "ALPHAQ_CACHE", "XDG_CACHE_HOME")
    patch.setenv("HOME", str(tmp_path / "file"))


def _without(patch, *names):
    for name in names:
        patch.delenv(name, raising=False)
