# Makes the packages of this checkout importable as they are, on a GPU machine where nothing can be installed:
#   source tests/gpu/setup.sh
# Elsewhere `pip install -e .` does the same.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p /tmp/refleet-here/refleet
for part in publisher worker common; do ln -sfn "$here/$part" "/tmp/refleet-here/refleet/$part"; done
ln -sfn "$here/common/_root/__init__.py" /tmp/refleet-here/refleet/__init__.py
export PYTHONPATH=/tmp/refleet-here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
