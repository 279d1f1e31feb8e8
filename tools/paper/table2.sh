#!/usr/bin/env bash
# Table 2 of the paper: what the network predicts, against the loss it is trained by. Trains each row,
# draws NUM images of it for FID and Inception score, and measures its bits/dim. The scores are taken
# with INCEPTION=FILE (which tools/convert_inception.py makes); without, the images are kept as
# OUT/NAME.npz. A row that diverges stops, as two of the paper's did, and is noted.
#
#   tools/paper/table2.sh DATA OUT [flags of ddpm train ...]
#
# DATA: the CIFAR-10 binary folder. OUT: a folder, one run in it for each row; the same command goes on
# with what is there. PRESET (cifar10), NUM (50000), SAMPLE ("--sampler ddpm") and EVAL_NUM (10000) may
# be set. All rows in some minutes:
#   PRESET=tiny NUM=16 EVAL_NUM=4 SAMPLE="--steps 20" tools/paper/table2.sh shapes out --steps 200
set -euo pipefail
if (($# < 2)); then
  echo "usage: $0 DATA OUT [flags of ddpm train ...]" >&2
  exit 2
fi
cd "$(dirname "$0")/../.."
ddpm=${DDPM_BUILD_DIR:-build}/ddpm
data=$1 out=$2
shift 2
preset=${PRESET:-cifar10} num=${NUM:-50000} eval_num=${EVAL_NUM:-10000}
read -r -a sample <<<"${SAMPLE:---sampler ddpm}"
mkdir -p "$out"

# Isotropic variances are beta, as in the paper's CIFAR-10 models.
fixed="scheduler.variance_type=fixed_large unet.out_channels=3"
learned="scheduler.variance_type=learned unet.out_channels=6"
rows=(
  "mean-learned      scheduler.prediction_type=previous_mean train.loss=kl $learned"
  "mean-fixed        scheduler.prediction_type=previous_mean train.loss=kl $fixed"
  "mean-simple       scheduler.prediction_type=previous_mean train.loss=simple $fixed"
  "epsilon-learned   scheduler.prediction_type=epsilon train.loss=kl $learned"
  "epsilon-fixed     scheduler.prediction_type=epsilon train.loss=kl $fixed"
  "epsilon-simple    scheduler.prediction_type=epsilon train.loss=simple $fixed"
)

for row in "${rows[@]}"; do
  read -r name settings <<<"$row"
  flags=()
  for setting in $settings; do flags+=(--set "$setting"); done
  echo "== $name: $settings" >&2
  status=0
  "$ddpm" train --preset "$preset" --data "$data" --out "$out/$name" --stop-on-divergence \
    "${flags[@]}" "$@" || status=$?
  if ((status == 7)); then
    echo "$name unstable" >"$out/$name.result"
    continue
  fi
  ((status == 0)) || exit "$status"
  scores=
  if [[ -n ${INCEPTION:-} ]]; then
    scores=$("$ddpm" eval --metric fid --model "$out/$name" --data "$data" --num "$num" \
      --inception "$INCEPTION" --statistics "$out/statistics.safetensors" \
      --out "$out/$name.fid.json" "${sample[@]}" |
      awk '/^FID/ { fid = $2 } /^inception score/ { is = $3 } END { print "FID", fid, "IS", is }')
  else
    "$ddpm" sample --model "$out/$name" --num "$num" --out "$out/$name.npz" "${sample[@]}"
  fi
  "$ddpm" eval --model "$out/$name" --data "$data" --num "$eval_num" --out "$out/$name.json" |
    awk -v name="$name" -v scores="$scores" \
      '/^bits\/dim/ { print name, $2, "bits/dim", scores }' >"$out/$name.result"
done
cat "$out"/*.result
