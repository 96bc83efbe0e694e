#!/usr/bin/env bash
# A throw-away Slurm on this host, for tests, as root: cluster.sh up FOLDER NODES, then cluster.sh down FOLDER.
# Debian's slurmd takes -N, so several nodes share one host. No systemd, cgroups or database.
set -euo pipefail
action=$1 folder=$2
export SLURM_CONF=$folder/slurm.conf

end() {
    # Whether it is gone is asked with kill -0; a kill that finds nobody is no error.
    kill "$1" 2>/dev/null || return 0
    for _ in $(seq 200); do
        if ! kill -0 "$1" 2>/dev/null; then return 0; fi
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null || true
}

down() {
    scancel --user=root 2>/dev/null || true
    local file
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do
        if [ -s "$file" ]; then end "$(cat "$file")"; fi
    done
}

munge() {
    mkdir -p "$folder"/{state,log,spool,munge}
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
    chmod 400 "$folder/munge/key"
    chmod 755 "$folder" "$folder/munge"
    chown -R munge:munge "$folder/munge"
    setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged --force --key-file="$folder/munge/key" \
        --socket="$folder/munge/sock" --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" \
        --seed-file="$folder/munge/seed"
}

configuration() {
    # cred_expire: a requeued job waits that long, two minutes by default.
    cat <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge/sock,cred_expire=5
SlurmctldPort=26817
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=5
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=120
SlurmdTimeout=10
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    for node in $(seq "$1"); do
        echo "NodeName=n$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((26900 + node)) CPUs=4 RealMemory=8000"
    done
}

case $action in
up)
    nodes=$3
    munge
    configuration "$nodes" >"$SLURM_CONF"
    slurmctld -c
    for node in $(seq "$nodes"); do
        mkdir -p "$folder/spool/n$node"
        slurmd -N "n$node"
    done
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$nodes" ]; then exit 0; fi
        sleep 0.2
    done
    down
    echo "the nodes did not get ready" >&2
    exit 1
    ;;
down) down ;;
esac
