#!/usr/bin/env python3
"""The only command a new user needs: makes `.venv` beside this file, installs into it, and runs.

    python3 run.py chat [MODEL]      talk to a model (the bundled demo by default)
    python3 run.py test [ARGS...]    run the test suite (ARGS go to pytest)
    python3 run.py COMMAND ...       any other `exl` command: run, info, doctor, ...

Standard library only, and readable by old Pythons, so that a wrong version gets a sentence instead of a syntax error.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
BIN = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin")
PYTHON = os.path.join(BIN, "python.exe" if os.name == "nt" else "python")
MINIMUM = (3, 10)


class SetupError(Exception):
    """What the person at the keyboard can fix."""


def has_nvidia_driver():
    """True when a CUDA build of torch would be of use here."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def fingerprint(extra):
    """Changes whenever an installation made earlier is no longer what we would install now."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints-cpu.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    digest.update(repr((ROOT, sys.version_info[:3], extra, has_nvidia_driver())).encode())
    return digest.hexdigest()


def lock(handle):
    """Hold an exclusive lock until the process ends; the system frees it even after kill -9."""
    try:
        import fcntl
    except ImportError:  # Windows: two set-ups at once are not guarded against
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("another set-up is running in this folder, waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)


def say(text):
    sys.stderr.write("run.py: %s\n" % text)
    sys.stderr.flush()


def call(command, failure):
    # pip runs without the user's own site packages and settings of an outer environment leaking in
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    try:
        code = subprocess.call(command, env=environment)
    except OSError as error:
        raise SetupError("%s: %s" % (failure, error))
    if code != 0:
        raise SetupError(failure)


def make_venv():
    # --clear also repairs a folder that an interrupted earlier attempt left half-made
    call(
        [sys.executable, "-m", "venv", "--clear", VENV],
        "could not create %s. On Debian and Ubuntu: apt install python3-venv" % VENV,
    )


def install(extra):
    target = ROOT + ("[%s]" % extra if extra else "")
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    if not has_nvidia_driver():
        command += ["--constraint", os.path.join(ROOT, "constraints-cpu.txt")]
    call(
        command + ["--editable", target],
        "installing the packages failed; pip's message is above. "
        "Check the network and the free disk space, then run the same command again",
    )


def prepare(extra):
    """Bring `.venv` to the state this checkout needs; does nothing when it already is."""
    stamps = {name: os.path.join(VENV, ".exl-ready-" + (name or "base")) for name in ("", "test")}

    def ready(name):
        try:
            with open(stamps[name]) as file:
                return file.read() == fingerprint(name) and os.path.exists(PYTHON)
        except OSError:
            return False

    if ready(extra) or ready("test"):
        return
    with open(os.path.join(ROOT, ".venv.lock"), "a") as handle:
        lock(handle)
        if ready(extra) or ready("test"):
            return
        started = time.time()
        say("setting up %s (once, about a minute)" % VENV)
        if (
            not os.path.exists(PYTHON)
            or subprocess.call([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            != 0
        ):
            make_venv()
        install(extra)
        with open(stamps[extra] + ".new", "w") as file:
            file.write(fingerprint(extra))
        os.replace(stamps[extra] + ".new", stamps[extra])
        say("ready after %d s" % (time.time() - started))


def main(arguments):
    if sys.version_info < MINIMUM:
        raise SetupError("Python %d.%d or newer is needed, this is %s" % (MINIMUM + (sys.version.split()[0],)))
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(__doc__)
        return 0
    testing = arguments[0] == "test"
    prepare("test" if testing else "")
    command = [PYTHON, "-m"] + (["pytest"] + arguments[1:] if testing else ["exl_runtime"] + arguments)
    if testing:
        os.chdir(ROOT)
    if os.name == "nt":
        return subprocess.call(command)
    sys.stdout.flush()
    os.execv(PYTHON, command)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
