#!/usr/bin/env bash
# LibriSpeech, from audio to word error rates. README.md beside this file explains every step.
#
#   LIBRISPEECH=/corpora/LibriSpeech bash examples/librispeech/run.sh [STAGE...]
#
# Stages, in order (default: all): prepare cost pretrain finetune decode table. A stage that is done is skipped, a
# training that was killed goes on from its last checkpoint; delete a stage's folder to do it again.
set -euo pipefail

LIBRISPEECH=${LIBRISPEECH:-}                 # the corpus: holds train-clean-100, dev-other, test-clean, ...
WORK=${WORK:-$PWD/outputs/librispeech}       # where everything goes
PRETRAINING=${PRETRAINING:-w2v2_light_base}  # recipe in config/pretraining
FINETUNING=${FINETUNING:-100h}               # recipe in config/finetuning: 100h, 10h, 1h or 10m
POINT=${POINT:-}                             # fine-tune to this operating point only; empty: as pre-trained
POINTS=${POINTS:-}                           # decode at these, e.g. "s1q1k1 s2q1k1 s2q1k2"; empty: the model's own
PRETRAIN_SUBSETS=${PRETRAIN_SUBSETS:-train-clean-100 train-clean-360 train-other-500}
TRAIN_SUBSETS=${TRAIN_SUBSETS:-}             # of fine-tuning; empty: those of FINETUNING
VALID_SUBSET=${VALID_SUBSET:-dev-other}
TEST_SUBSETS=${TEST_SUBSETS:-test-clean test-other}
GPUS=${GPUS:-}                               # empty: all of this machine
PRETRAIN_ARGS=${PRETRAIN_ARGS:-}             # further hydra overrides, separated by blanks
FINETUNE_ARGS=${FINETUNE_ARGS:-}
DECODE_ARGS=${DECODE_ARGS:-}

fail() { echo "run.sh: $*" >&2; exit 2; }
say() { echo "[$(date +%H:%M:%S)] $*"; }

# The tools may live in a virtual environment that is not activated: PYTHON=.venv/bin/python
PYTHON=$(command -v "${PYTHON:-python3}") || fail "no such command; set PYTHON to the interpreter that has the plugin"
hydra_train=$(dirname "$PYTHON")/fairseq-hydra-train
[ -x "$hydra_train" ] || fail "no $hydra_train: set PYTHON to the interpreter that has fairseq"
light() { "$PYTHON" -m fairseq_w2v2_light.cli "$@"; }

[ -n "$LIBRISPEECH" ] || fail "set LIBRISPEECH to the folder that holds train-clean-100, dev-other, ..."
[ -d "$LIBRISPEECH" ] || fail "LIBRISPEECH=$LIBRISPEECH: no such folder"
user_dir=$(light user-dir)
config_dir=$(light config-dir)
for recipe in "pretraining/$PRETRAINING" "finetuning/$FINETUNING"; do
    [ -f "$config_dir/$recipe.yaml" ] || fail "no recipe $config_dir/$recipe.yaml"
done
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)  # hydra changes the working directory
LIBRISPEECH=$(cd "$LIBRISPEECH" && pwd)

if [ -z "$GPUS" ]; then
    GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$GPUS" -gt 0 ] || fail "no GPU here; on a CPU: GPUS=1, and common.fp16=false in PRETRAIN_ARGS and FINETUNE_ARGS"
fi

setting() { # setting RECIPE SECTION.KEY: its value in the YAML
    "$PYTHON" - "$config_dir/$1.yaml" "$2" << 'PY'
import sys

import yaml

value = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
for key in sys.argv[2].split("."):
    value = value[key]
print(str(value[0] if isinstance(value, list) else value).lower())
PY
}

update_freq() { # update_freq RECIPE: batches that each of our GPUs accumulates for the recipe's batch an update
    local world frequency
    world=$(setting "$1" distributed_training.distributed_world_size)
    frequency=$(setting "$1" optimization.update_freq)
    local total=$((world * frequency))
    [ $((total % GPUS)) -eq 0 ] || fail "GPUS=$GPUS does not divide the $total batches an update of $1"
    echo $((total / GPUS))
}

train_subsets() {
    if [ -n "$TRAIN_SUBSETS" ]; then echo "$TRAIN_SUBSETS"; return; fi
    case $FINETUNING in
        100h) echo train-clean-100 ;;
        10h) echo librispeech_finetuning/1h librispeech_finetuning/9h ;;
        1h) echo librispeech_finetuning/1h ;;
        10m) echo librispeech_finetuning/1h/0 ;;
        *) fail "set TRAIN_SUBSETS: which folders of LIBRISPEECH does FINETUNING=$FINETUNING train on?" ;;
    esac
}

unlabelled=$WORK/data/pretraining
labelled=$WORK/data/$FINETUNING
pretrained=$WORK/$PRETRAINING/pretrain
finetuned=$WORK/$PRETRAINING/$FINETUNING${POINT:+-$POINT}

prepare() {
    # a finished folder holds prepared.json; an interrupted run of prepare leaves nothing
    if [ ! -f "$unlabelled/prepared.json" ]; then
        # shellcheck disable=SC2086
        light prepare librispeech "$LIBRISPEECH" "$unlabelled" --train $PRETRAIN_SUBSETS --valid "$VALID_SUBSET" --test
    fi
    if [ ! -f "$labelled/prepared.json" ]; then
        local subset subsets tests=()
        subsets=$(train_subsets)
        for subset in $TEST_SUBSETS; do tests+=(--split "${subset//-/_}=$subset"); done
        # shellcheck disable=SC2086
        light prepare librispeech "$LIBRISPEECH" "$labelled" --train $subsets --valid "$VALID_SUBSET" \
            --test "${tests[@]}"
    fi
    light prepare check "$unlabelled"
    light prepare check "$labelled"
}

cost() {
    light cost "pretraining/$PRETRAINING"
}

train() { # train FOLDER RECIPE OVERRIDES...: until its last update
    local folder=$1 recipe=$2 frequency
    shift 2
    if [ -f "$folder/done" ]; then say "$folder is trained"; return; fi
    frequency=$(update_freq "$recipe")
    mkdir -p "$folder"
    "$hydra_train" common.user_dir="$user_dir" checkpoint.save_dir="$folder" hydra.run.dir="$folder/log" \
        distributed_training.distributed_world_size="$GPUS" optimization.update_freq="[$frequency]" "$@" \
        --config-dir "$config_dir/${recipe%/*}" --config-name "${recipe#*/}"
    touch "$folder/done"
}

pretrain() {
    # shellcheck disable=SC2086
    train "$pretrained" "pretraining/$PRETRAINING" task.data="$unlabelled" $PRETRAIN_ARGS
}

best() { # best FOLDER: the checkpoint with the best validation, else the last one
    local path
    for path in "$1/checkpoint_best.pt" "$1/checkpoint_last.pt"; do
        if [ -f "$path" ]; then echo "$path"; return; fi
    done
    fail "$1: holds no checkpoint; run the stage before"
}

finetune() {
    local start normalize
    start=$(best "$pretrained")
    normalize=$(setting "pretraining/$PRETRAINING" task.normalize)
    # shellcheck disable=SC2086
    train "$finetuned" "finetuning/$FINETUNING" task.data="$labelled" model.w2v_path="$start" \
        task.normalize="$normalize" model.operating_point="$POINT" $FINETUNE_ARGS
}

decode() {
    local checkpoint point split folder
    checkpoint=$(best "$finetuned")
    for point in ${POINTS:-own}; do
        for split in ${TEST_SUBSETS//-/_}; do
            folder=$finetuned/decode/$point/$split
            if [ -f "$folder/wer.txt" ]; then continue; fi
            mkdir -p "$folder"
            local at=()
            if [ "$point" != own ]; then at=(decoding.operating_point="$point"); fi
            # shellcheck disable=SC2086
            light infer task.data="$labelled" common_eval.path="$checkpoint" dataset.gen_subset="$split" \
                common_eval.results_path="$folder" "${at[@]}" $DECODE_ARGS | tee "$folder/log.txt"
            tail -n 1 "$folder/log.txt" > "$folder/wer.txt"
        done
    done
}

table() {
    local path
    for path in "$WORK/$PRETRAINING"/*/decode/*/*/wer.txt; do
        [ -f "$path" ] || fail "nothing is decoded yet"
        path=${path#"$WORK/"}
        echo "${path%%/decode/*}  $(cat "$WORK/$path")"
    done
}

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(prepare cost pretrain finetune decode table)
for stage in "${stages[@]}"; do
    case $stage in
        prepare | cost | pretrain | finetune | decode | table) say "== $stage"; "$stage" ;;
        *) fail "unknown stage $stage; expected prepare, cost, pretrain, finetune, decode or table" ;;
    esac
done
