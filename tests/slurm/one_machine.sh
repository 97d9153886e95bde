#!/bin/bash
# A real Slurm on this machine, without systemd: one_machine.sh start FOLDER | stop FOLDER. As root, on Debian or Ubuntu.
# FOLDER gets slurm.conf, logs and state; SLURM_CONF=FOLDER/slurm.conf leads Slurm's commands there. There is no accounting database.
set -euo pipefail
action=${1:?start or stop} folder=$(realpath -m "${2:?the folder of this Slurm}")
port=${SLURM_PORT:-26817}

case $action in
start)
    command -v slurmctld slurmd munged >/dev/null || { apt-get install -y slurm-wlm munge >"$folder.apt.log" 2>&1; }
    mkdir -p "$folder/state" "$folder/spool" /run/munge
    chown munge /run/munge
    pgrep -x munged >/dev/null || su -s /bin/sh munge -c "/usr/sbin/munged --force"
    name=$(hostname -s)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
KillWait=30
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000
PartitionName=main Nodes=$name Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 60); do
        sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
        sleep 0.5
    done
    echo "Slurm does not come up: see $folder/*.log" >&2
    exit 1
    ;;
stop)
    export SLURM_CONF=$folder/slurm.conf
    scancel --user=root 2>/dev/null || true
    for daemon in slurmd slurmctld; do
        [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
    done
    ;;
*)
    echo "start or stop, not $action" >&2
    exit 2
    ;;
esac
