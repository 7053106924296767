#!/usr/bin/env bash
# Fetches NVIDIA's MathDx (cuSolverDx, cuBLASDx) for building lplb against its headers, and unpacks it.
#
#     MATHDX_HOME=~/mathdx ./download-mathdx.sh        then: MATHDX_HOME=~/mathdx pip install .
#
# MATHDX_HOME    where to (default: mathdx, here); an installation that is there is left alone
# CUDA_MAJOR     12 or 13 (default: what nvcc says, of CUDA_HOME or on PATH)
# MATHDX_SHA256  checksum of the archive; needed where none is pinned below
#
# Not needed with the wheel nvidia-libmathdx-cu13 (pip install "lplb[mathdx]" says which), which holds the same functions.
# MathDx is NVIDIA's, under NVIDIA's licence: see the LICENSE in the archive.
set -euo pipefail

version=26.06.0
# By CUDA major, as other public projects pin it. A wrong one only refuses the archive.
declare -A sha256s=([13]=042b7c57a636c271cca32dffcc0a822ed6b2abc0b8ef5703ab2445d58563a1e6)

die() {
  echo "download-mathdx.sh: $*" >&2
  exit 1
}

if [[ -z ${CUDA_MAJOR:-} ]]; then
  nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
  said=$("$nvcc" --version) || die "$nvcc does not run; set CUDA_HOME, or CUDA_MAJOR to 12 or 13"
  [[ $said =~ V([0-9]+)\.([0-9]+)\.([0-9]+) ]] || die "no version in what $nvcc says: $said"
  CUDA_MAJOR=${BASH_REMATCH[1]}
  seen=${BASH_REMATCH[1]}.${BASH_REMATCH[2]}.${BASH_REMATCH[3]}
  # nvcc 12.6.85 is that of CUDA 12.6.3
  [[ $(printf '%s\n' 12.6.85 "$seen" | sort -V | head -n 1) == 12.6.85 ]] ||
    die "nvcc is $seen; MathDx needs 12.6.85 (CUDA 12.6.3) or newer"
fi
[[ $CUDA_MAJOR == 12 || $CUDA_MAJOR == 13 ]] || die "CUDA_MAJOR is '$CUDA_MAJOR'; it may be 12 or 13"

home=${MATHDX_HOME:-$(cd "$(dirname "$0")" && pwd)/mathdx}
if [[ -n $(find "$home" -path '*/lib/libcusolverdx.fatbin' -print -quit 2>/dev/null) ]]; then
  echo "$home has MathDx already"
  exit 0
fi

sha256=${MATHDX_SHA256:-${sha256s[$CUDA_MAJOR]:-}}
[[ -n $sha256 ]] || die "no checksum is pinned for MathDx $version of CUDA $CUDA_MAJOR; set MATHDX_SHA256 to NVIDIA's"

archive=nvidia-mathdx-$version-cuda$CUDA_MAJOR.tar.gz
url=https://developer.download.nvidia.com/compute/cublasdx/redist/cublasdx/cuda$CUDA_MAJOR/$archive
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "fetching $url"
curl --fail --location --silent --show-error --output "$folder/$archive" "$url"
seen=$(sha256sum "$folder/$archive" | cut -d ' ' -f 1)
[[ $seen == "$sha256" ]] || die "$archive has the SHA-256 $seen; $sha256 was expected"
mkdir -p "$home"
tar -xzf "$folder/$archive" -C "$home"
echo "MathDx $version for CUDA $CUDA_MAJOR is in $home; build with MATHDX_HOME=$home"
