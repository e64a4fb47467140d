//! Stock Linux guests and the end-to-end tests, on nested paging, in the rig.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tests::initramfs::Initramfs;
use tests::rig::{Error, Host, Mmu, Outcome, Payload};
use tests::store::Store;
use tests::{debian, e2e, peer, recipe, skip, store};

/// The right to run a rig, which keeps one CPU of this machine busy.
struct Turn;

impl Turn {
    /// Waits until a CPU is free: with more rigs than CPUs they would only slow each other down.
    fn wait() -> Turn {
        let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get());
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        *ENDED.wait_while(running, |running| *running >= cpus).unwrap_or_else(PoisonError::into_inner) += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}

/// Rigs that run now, and the news that one of them has ended.
static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// Fetches what the rig needs for a host of `series`, or skips `test` where that cannot be had: on a machine
/// without Debian's packages (a failure in CI), or of a series that the mirror no longer has.
fn store_or_skip(test: &str, series: &str) -> Option<Store> {
    let store = Store::open();
    let packages = store
        .qemu()
        .and_then(|_| store.busybox())
        .and_then(|_| store.kernel(recipe::DEFAULT_SERIES))
        .and_then(|_| store.kernel(series));
    match packages {
        Ok(_) => Some(store),
        Err(store::Error::Debian(debian::Error::NoPackage { .. })) if series != recipe::DEFAULT_SERIES => {
            skip::skip(test, &format!("the mirror has no kernel {series}"));
            None
        }
        Err(e) if e.is_unavailable() && !skip::in_ci() => {
            skip::skip(test, &e.to_string());
            None
        }
        Err(e) => panic!("the rig cannot be brought up: {e}"),
    }
}

fn run(store: &Store, host: &Host, payload: &Payload) -> Outcome {
    let _turn = Turn::wait();
    host.run(store, payload, |_, _| {}).unwrap_or_else(|e| panic!("{e}"))
}

/// A guest's userland script: says what it finds, in lines `guest KEY VALUE`, reads the disk, writes to a part of it.
const GUEST_SCRIPT: &str = "\
say() { echo guest $1 $2; }
say kernel $(uname -r)
say cpus $(nproc)
say random-bytes $(head -c 24 /dev/hwrng | wc -c)
say disk-before $(sha256sum </dev/vda | cut -c 1-64)
dd if=/dev/urandom of=/dev/vda bs=4096 seek=77 count=300 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
say disk-after $(sha256sum </dev/vda | cut -c 1-64)
memstress --size 48M --pattern rand --passes 2 --verify && say memory intact";

/// The value of the line `who key VALUE` on the console.
fn value<'a>(console: &'a str, who: &str, key: &str) -> Option<&'a str> {
    let prefix = format!("{who} {key} ");
    console.lines().find_map(|line| line.strip_prefix(&prefix))
}

/// Boots a stock guest of `series` in L1 and checks what its userland says and what its disk then holds.
///
/// `monitor` is a shell command that boots `/images/vmlinux` with the initramfs `/images/initrd`, the command
/// line `$CMDLINE`, `cpus` vCPUs and the disk `/tmp/disk`.
fn linux_guest(store: &Store, series: &str, cpus: u32, monitor: &str, tools: Payload) {
    let mut guest = Initramfs::new();
    guest.file("/run.sh", 0o755, GUEST_SCRIPT.as_bytes());
    let payload = tools.with_script(format!(
        "say() {{ echo host $1 $2; }}\n\
         CMDLINE='console=ttyS0 quiet panic=-1'\n\
         cat /images/initramfs /images/guest.cpio >/images/initrd\n\
         dd if=/dev/urandom of=/tmp/disk bs=1M count=8 2>/dev/null\n\
         say disk-before $(sha256sum </tmp/disk | cut -c 1-64)\n\
         {monitor}\n\
         status=$?\n\
         say disk-after $(sha256sum </tmp/disk | cut -c 1-64)\n\
         exit $status"
    ));
    let payload = recipe::with_linux_guest(payload, store, series).unwrap();
    let payload = payload.put_bytes("/images/guest.cpio", guest.finish());
    let outcome = run(store, &Host::default(), &payload);
    let console = &outcome.console;
    let said = |who, key| value(console, who, key).unwrap_or_else(|| panic!("no {who} {key}:\n{console}"));
    assert!(said("guest", "kernel").starts_with(series), "{console}");
    assert_eq!(said("guest", "cpus"), cpus.to_string(), "{console}");
    assert_eq!(said("guest", "random-bytes"), "24", "{console}");
    assert_eq!(said("guest", "disk-before"), said("host", "disk-before"), "{console}");
    assert_eq!(said("guest", "disk-after"), said("host", "disk-after"), "{console}");
    assert_ne!(
        said("host", "disk-before"),
        said("host", "disk-after"),
        "the guest wrote nothing:\n{console}"
    );
    assert_eq!(said("guest", "memory"), "intact", "{console}");
    assert!(console.contains("init: exit status 0"), "{console}");
    assert_eq!(outcome.status, 0, "{console}");
}

fn vmm_boots_linux(test: &str, kernel: &str, series: &str, cpus: u32, options: &str) {
    let Some(store) = store_or_skip(test, series) else { return };
    let tools = e2e::with_vmm(Payload::default()).unwrap();
    let monitor = format!(
        "vmm run --quiet {options} --cpus {cpus} --kernel /images/{kernel} \
         --initrd /images/initrd --cmdline \"$CMDLINE\" --disk path=/tmp/disk"
    );
    linux_guest(&store, series, cpus, &monitor, tools);
}

/// Every page that it touches is brought by the monitor, every first write is seen by it.
#[test]
fn vmm_boots_stock_linux_and_serves_its_faults() {
    let test = "vmm_boots_stock_linux_and_serves_its_faults";
    let options =
        "--memory size=256M,huge=thp,fault=uffd --prefault around=64K --prefault-age old --track exact";
    vmm_boots_linux(test, "vmlinux", "6.12", 1, options);
}

#[test]
fn vmm_boots_stock_linux_on_two_cpus_and_tracks_it() {
    let test = "vmm_boots_stock_linux_on_two_cpus_and_tracks_it";
    let options = "--memory size=256M,shared=on --track kvm-manual --owners on --working-set 2s";
    vmm_boots_linux(test, "vmlinux", "6.12", 2, options);
}

#[test]
fn vmm_boots_a_stock_bzimage_of_an_older_kernel() {
    vmm_boots_linux(
        "vmm_boots_a_stock_bzimage_of_an_older_kernel",
        "bzImage",
        "6.1",
        2,
        "--memory size=256M --track none",
    );
}

/// A guest's userland script: a program that writes and checks its memory until a line comes on the console.
const BUSY_SCRIPT: &str = "\
say() { echo guest $1 $2; }
(while [ ! -e /stop ]; do
    memstress --size 48M --pattern rand --passes 1 --verify >/dev/null || touch /failed
    echo >>/passes
done) &
say writes yes
read line </dev/ttyS0
touch /stop
wait
[ -e /failed ] || say memory intact
say passes $(wc -l </passes)";

/// For each of $MODES: a dump, a full snapshot and five diffs of the guest, the end of its monitor without warning, another one
/// that goes on from the last diff, and two migrations, there and back.
const EVERYTHING: &str = "\
fail() { echo host failed \"$1\"; tail -n 5 /tmp/*.err /tmp/*.out; exit 1; }
begin() {
    name=$1
    shift
    vmm \"$@\" --quiet --epoch 500ms --api-socket /tmp/$name.api </tmp/input >/tmp/$name.out 2>/tmp/$name.err &
    pid=$!
}
until_there() {
    count=0
    until [ -S $1 ]; do
        kill -0 $pid && [ $count -lt 600 ] || fail \"no $1\"
        count=$((count + 1))
        sleep 0.1
    done
}
move() {
    old=$name oldpid=$pid
    begin $1 run --incoming unix:/tmp/$1.in
    until_there /tmp/$1.in
    vmm migrate --api-socket /tmp/$old.api --downtime 300ms --auto-converge unix:/tmp/$1.in || fail \"migration to $1\"
    wait $oldpid || fail \"the end of $old\"
    until_there /tmp/$1.api
}
mkfifo /tmp/input
sleep 1000000 >/tmp/input &
cat /images/initramfs /images/guest.cpio >/images/initrd
begin first run --memory size=192M --cpus 2 --kernel /images/vmlinux --initrd /images/initrd \
    --cmdline 'console=ttyS0 quiet panic=-1'
until grep -q 'guest writes yes' /tmp/first.out; do
    kill -0 $pid || fail 'the start'
    sleep 0.2
done
for mode in $MODES; do
    vmm dirty dump --api-socket /tmp/$name.api --pages --full --epochs 2 --interval 500ms -o /tmp/dump || fail dump
    vmm log verify /tmp/dump || fail 'verification of the dump'
    vmm snapshot --api-socket /tmp/$name.api /tmp/kept-0 || fail 'full snapshot'
    for number in 1 2 3 4 5; do
        vmm snapshot --api-socket /tmp/$name.api --diff /tmp/kept-$number || fail \"diff $number\"
    done
    vmm log verify /tmp/kept-5 || fail 'verification of the chain'
    kill -9 $pid
    wait $pid
    begin restored-$mode restore /tmp/kept-5 --memory mode=$mode
    until_there /tmp/$name.api
    move there-$mode
    move back-$mode
    rm -rf /tmp/kept-* /tmp/dump
    echo host round $mode
done
echo stop >/tmp/input
wait $pid
status=$?
cat /tmp/$name.out
exit $status";

/// Once, or three times if MIGRATIONS is set.
#[test]
fn stock_linux_is_dumped_kept_restored_and_moved_again_and_again() {
    let test = "stock_linux_is_dumped_kept_restored_and_moved_again_and_again";
    let Some(store) = store_or_skip(test, "6.12") else { return };
    let mut guest = Initramfs::new();
    guest.file("/run.sh", 0o755, BUSY_SCRIPT.as_bytes());
    // An emulator takes two minutes for each.
    let modes = if std::env::var_os("MIGRATIONS").is_some() { "lazy eager map" } else { "lazy" };
    let script = format!("MODES='{modes}'\n{EVERYTHING}");
    let payload = e2e::with_vmm(Payload::default()).unwrap().with_script(script);
    let payload = recipe::with_linux_guest(payload, &store, "6.12").unwrap();
    let payload = payload.put_bytes("/images/guest.cpio", guest.finish());
    let Outcome { status, console } = run(&store, &Host::default(), &payload);
    for mode in modes.split(' ') {
        assert!(console.contains(&format!("host round {mode}")), "{console}");
    }
    assert_eq!(value(&console, "guest", "memory"), Some("intact"), "{console}");
    let passes: u64 = value(&console, "guest", "passes").unwrap_or("0").trim().parse().unwrap();
    assert!(passes > 0 && status == 0, "{status} {console}");
}

/// What it measures here is work; that it says so is what counts.
#[test]
fn the_bench_runs_and_says_that_times_mean_little() {
    let test = "the_bench_runs_and_says_that_times_mean_little";
    let Some(store) = store_or_skip(test, "6.12") else { return };
    let script = "for bench in boot fault dirty; do vmm bench $bench --memory 2M --json /tmp/$bench || exit 1; done\n\
                  vmm bench compare /tmp/dirty /tmp/dirty";
    let payload = e2e::with_vmm(Payload::default()).unwrap().with_script(script);
    let Outcome { status, console } = run(&store, &Host::default(), &payload);
    assert_eq!(status, 0, "{console}");
    assert_eq!(console.matches("times mean little").count(), 6, "{console}");
    for said in
        ["boot: the start", "first writes to 2 MiB that are protected", "kvm-ring", "no change beyond"]
    {
        assert!(console.contains(said), "{said}: {console}");
    }
}

/// The yardstick: QEMU's microvm, which shows that rig, kernel and initramfs are good.
#[test]
fn qemu_boots_stock_linux_on_two_cpus() {
    let Some(store) = store_or_skip("qemu_boots_stock_linux_on_two_cpus", "6.12") else { return };
    let tools = peer::with_qemu(Payload::default(), &store.qemu().unwrap()).unwrap();
    let monitor = "qemu-microvm -m 256 -smp 2 -kernel /images/vmlinux -initrd /images/initrd -append \"$CMDLINE\" \
                   -drive file=/tmp/disk,format=raw,if=none,id=disk -device virtio-blk-device,drive=disk \
                   -device virtio-rng-device";
    linux_guest(&store, "6.12", 2, monitor, tools);
}

/// What a host in the rig may lack, as the tests that are skipped for it say: anything else has to be there.
fn may_lack(host: &Host, reason: &str) -> bool {
    let always = ["does not emulate ring 0", "is on a tmpfs", "no swap: ", "no memory cgroups"];
    // userfaultfd's write protection of what is not mapped yet, and its asynchronous form, came with 6.4 and 6.7.
    let before_6_4 = ["UFFD_FEATURE_WP_UNPOPULATED", "this host lacks", "no userfaultfd"];
    let lacks = |words: &[&str]| words.iter().any(|words| reason.contains(words));
    lacks(&always) || (host.kernel == "6.1" && lacks(&before_6_4))
}

/// The test executables that depend most on the host's kernel and on how it maps memory.
const TRACKING: [&str; 2] = ["kvm", "conformance"];

/// What is left out where only these run, because it takes an emulator long and does not depend on that: a promise of KVM's
/// that is the same however memory is mapped, and a race of this process's threads.
const LEFT_OUT: [&str; 4] = [
    "--skip",
    "guests_that_take_asynchronous_faults_get_on",
    "--skip",
    "writers_harvests_drops_and_collapses_at_once_lose_nothing",
];

/// What is left out besides where these run on another kernel: huge pages of the pool, whose MMU code is the default host's, or
/// that of the one without the TDP MMU.
const LEFT_OUT_ELSEWHERE: [&str; 2] = ["--skip", "all_conform_over_hugetlb"];

/// What is left out besides on another MMU: what the host's kernel does with memory, whoever maps it for a guest.
const LEFT_OUT_ON_OTHER_MMUS: [&str; 8] =
    ["--skip", "fault::", "--skip", "host_map::", "--skip", "reclaim::", "--skip", "touched::"];

/// Runs test executables that need only KVM in L1, and tells what they skip.
fn pass(test: &str, host: &Host, harnesses: &[&str]) {
    let Some(store) = store_or_skip(test, &host.kernel) else { return };
    let mut args = Vec::new();
    if harnesses == TRACKING {
        args.extend(LEFT_OUT);
        if matches!(host.mmu, Mmu::Shadow) || host.kernel != recipe::DEFAULT_SERIES {
            args.extend(LEFT_OUT_ELSEWHERE);
        }
        if matches!(host.mmu, Mmu::Shadow) || !host.tdp_mmu {
            args.extend(LEFT_OUT_ON_OTHER_MMUS);
        }
    }
    let cases = if *host == Host::default() { e2e::SOME } else { e2e::FEW };
    let payload = e2e::payload(harnesses.iter().map(|name| (*name, args.as_slice())), cases).unwrap();
    let Outcome { status, console } = run(&store, host, &payload);
    assert_eq!(status, 0, "{console}");
    assert_eq!(console.matches("test result: ok").count(), harnesses.len(), "{console}");
    for (_, reason) in console.lines().filter_map(|line| line.split_once("SKIPPED: ")) {
        assert!(may_lack(host, reason), "skipped without need: {reason}\n{console}");
        skip::skip(test, reason);
    }
}

#[test]
fn all_tests_pass_on_linux_6_12() {
    pass("all_tests_pass_on_linux_6_12", &Host::default(), &e2e::HARNESSES);
}

#[test]
fn trackers_are_exact_on_linux_6_1() {
    let host = Host { kernel: "6.1".into(), ..Host::default() };
    pass("trackers_are_exact_on_linux_6_1", &host, &TRACKING);
}

#[test]
fn trackers_are_exact_on_linux_7_2() {
    let host = Host { kernel: "7.2".into(), ..Host::default() };
    pass("trackers_are_exact_on_linux_7_2", &host, &TRACKING);
}

#[test]
fn trackers_are_exact_without_the_tdp_mmu() {
    let host = Host { tdp_mmu: false, eager_page_split: false, ..Host::default() };
    pass("trackers_are_exact_without_the_tdp_mmu", &host, &TRACKING);
}

#[test]
fn trackers_are_exact_with_shadow_paging() {
    let host = Host { mmu: Mmu::Shadow, ..Host::default() };
    pass("trackers_are_exact_with_shadow_paging", &host, &TRACKING);
}

#[test]
fn a_command_has_its_exit_status_and_its_output() {
    let test = "a_command_has_its_exit_status_and_its_output";
    let Some(store) = store_or_skip(test, "6.12") else { return };
    let payload = Payload::command(["sh", "-c", "cat /etc/it\\'s; ls /dev/kvm; kill -9 $$"]);
    let outcome = run(&store, &Host::default(), &payload.put_bytes("/etc/it's", "a file\n"));
    assert!(outcome.console.contains("a file\n/dev/kvm\n"), "{}", outcome.console);
    assert_eq!(outcome.status, 137);
}

#[test]
fn kvm_parameters_reach_the_host() {
    let Some(store) = store_or_skip("kvm_parameters_reach_the_host", "6.12") else { return };
    let host = Host { tdp_mmu: false, eager_page_split: false, mmu: Mmu::Shadow, cpus: 2, ..Host::default() };
    let payload = Payload::script(
        "cd /sys/module; cat kvm/parameters/tdp_mmu kvm/parameters/eager_page_split kvm_amd/parameters/npt; nproc",
    );
    let outcome = run(&store, &host, &payload);
    assert!(outcome.console.ends_with("N\nN\nN\n2\n"), "{}", outcome.console);
}

#[test]
fn a_run_without_an_end_is_stopped() {
    let Some(store) = store_or_skip("a_run_without_an_end_is_stopped", "6.12") else { return };
    let host = Host { timeout: Duration::from_secs(5), ..Host::default() };
    let _turn = Turn::wait();
    let error = host.run(&store, &Payload::script("sleep 1000000"), |_, _| {}).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn a_crashed_host_is_an_error() {
    let Some(store) = store_or_skip("a_crashed_host_is_an_error", "6.12") else { return };
    let _turn = Turn::wait();
    let payload = Payload::script("echo c >/proc/sysrq-trigger; sleep 1000");
    let error = Host::default().run(&store, &payload, |_, _| {}).unwrap_err();
    assert!(matches!(&error, Error::Ended { tail, .. } if tail.contains("Kernel panic")), "{error}");
}
