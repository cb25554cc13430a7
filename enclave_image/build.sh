#!/usr/bin/env bash
# Makes the enclave image file (EIF) of the enclave's image, and writes its measurements beside this script:
#   ./enclave_image/build.sh [--image NAME] [--output FILE] [--sign CERTIFICATE KEY] [-- POLICY ARGUMENTS...]
# What follows -- goes to key_policy.py, which then fills the policy of a KMS key:
#   ./enclave_image/build.sh -- --tenant acme --tenant-arn ARN --node-role-arn ARN --admin-arn ARN
# Needs Docker and nitro-cli (Amazon Linux 2023: dnf install aws-nitro-enclaves-cli aws-nitro-enclaves-cli-devel).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image=gpu-server/enclave:dev
output=enclave_image/enclave.eif
measurements=enclave_image/measurements.json
policy=enclave_image/kms-key-policy.json
signing=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --image) image=$2; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --sign) signing=(--signing-certificate "$2" --private-key "$3"); shift 3 ;;
        --) shift; break ;;
        *) echo "build.sh: what is $1? See the head of this script." >&2; exit 2 ;;
    esac
done

if ! command -v nitro-cli >/dev/null; then
    echo "build.sh: there is no nitro-cli here. It is part of Amazon Linux, see enclave_image/README.md." >&2
    exit 1
fi
# Its first lines are for people; the JSON begins with the first brace.
if ! said=$(nitro-cli build-enclave --docker-uri "$image" --output-file "$output" "${signing[@]}"); then
    echo "build.sh: nitro-cli could not build the image file of $image (see above)." >&2
    echo "          ./scripts/build_images.sh enclave makes that image." >&2
    exit 1
fi
sed -n '/^{/,$p' <<<"$said" >"$measurements"
echo "build.sh: $output is made; its measurements are in $measurements:"
cat "$measurements"

if [[ $# -gt 0 ]]; then
    python3 enclave_image/key_policy.py --measurements "$measurements" "$@" >"$policy.new"
    mv "$policy.new" "$policy"
    echo "build.sh: the policy for the KMS key is in $policy"
fi
