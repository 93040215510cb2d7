# Sourced by examples/quickstart.sh, tests/run.sh and .ci/run. Makes the environment of this checkout and enters it:
# $ROOT is the checkout, $VENV the environment ($MEGACM3_VENV, or .venv in the checkout), and `python` its interpreter.
# What is there and up to date is left alone, so a second call takes no time.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MEGACM3_VENV:-$ROOT/.venv}"

_fail() {
  echo "error: $*" >&2
  exit 2
}

_find_python() {
  # The first interpreter that is new enough, not too new, and can make environments. 3.11 is the one that the tests ran on.
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.10 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  _fail "no Python 3.10 to 3.13 with venv and ensurepip found (Debian: apt install python3-venv);" \
    "or name an environment that exists in MEGACM3_VENV"
}

_install() {
  local started=$SECONDS base
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    base="$(_find_python)" || exit 2
    echo "making the environment $VENV with $base"
    "$base" -m venv "$VENV" || _fail "could not make the environment $VENV"
  fi
  echo "installing requirements.txt into $VENV (once; some minutes)"
  "$VENV/bin/python" -m pip install -qq -r "$ROOT/requirements.txt" ||
    _fail "pip could not install requirements.txt into $VENV; the lines above say why"
  # The checkout itself: importable from any folder, as with an editable install, but with nothing built.
  echo "$ROOT" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/megacm3.pth"
  cp "$ROOT/requirements.txt" "$VENV/megacm3-requirements.txt"
  echo "the environment is ready after $((SECONDS - started)) s"
}

_environment() {
  # One installation at a time; the lock ends with the file handle. Where there is no flock, nothing is locked.
  if ! cmp -s "$ROOT/requirements.txt" "$VENV/megacm3-requirements.txt"; then
    exec 9<"$ROOT/requirements.txt"
    if command -v flock >/dev/null; then flock 9; fi
    cmp -s "$ROOT/requirements.txt" "$VENV/megacm3-requirements.txt" || _install
    exec 9<&-
  fi
  export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
  # Before the path file above: an environment may be shared by several checkouts.
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  unset PYTHONHOME
}

_environment
