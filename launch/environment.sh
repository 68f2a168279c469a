# shellcheck shell=bash
# Sourced by the other scripts: `install EXTRA...` sets up .venv in the checkout, with mert_jax and the
# given extras in the versions of constraints.txt, and puts it first on the PATH. Needs Python 3.11 or
# newer; PYTHON=... chooses one. Installs again only if pyproject.toml or constraints.txt has changed.

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or name it with PYTHON=/path/to/python" >&2
    return 2
}

install() {
    local python stamp extras
    extras=$(IFS=,; echo "$*")
    python=$(find_python) || return
    # several sets of extras can share the environment: each leaves its own stamp
    stamp=.venv/installed-${extras//,/-}-$(cat pyproject.toml constraints.txt | cksum | tr ' ' -)
    if [ ! -e "$stamp" ]; then
        echo "setting up .venv with $("$python" --version) and the extras [$extras]: a few minutes"
        if ! "$python" -m venv .venv; then
            echo "error: python -m venv failed; on Debian and Ubuntu, apt-get install python3-venv" >&2
            return 2
        fi
        # modules are compiled when first imported: compiling all of them takes as long as the rest
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
            --constraint constraints.txt --editable ".[$extras]" || return
        # it renders the made tasks; its dependencies play sound and do not build everywhere
        case ",$extras," in *,test,*)
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
                --only-binary :all: tinysoundfont==0.3.7 ||
                echo "no tinysoundfont for this Python: two tests of make_tasks are skipped" >&2 ;;
        esac
        rm -f .venv/installed-"${extras//,/-}"-*
        touch "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
