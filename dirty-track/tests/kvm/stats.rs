//! KVM's binary statistics on this host.

use crate::machine::{Machine, kvm};
use dirty_track::addr::Gfn;
use dirty_track::sys::stats::Stats;

#[test]
fn counters_of_a_vm_and_of_its_vcpu_are_found_by_name() {
    let Some(kvm) = kvm("counters_of_a_vm_and_of_its_vcpu_are_found_by_name") else { return };
    let (machine, mut guest) = Machine::new(&kvm, &[(Gfn(0x100), 16)]);
    let mut vm = Stats::of_vm(&machine.vm).unwrap();
    let mut vcpu = Stats::of_vcpu(guest.vcpu()).unwrap();
    let sizes = ["pages_4k", "pages_2m", "pages_1g"].map(|name| vm.find(name).expect(name));
    for name in ["pf_taken", "pf_fixed", "pf_emulate", "tlb_flush"] {
        assert!(vcpu.find(name).is_some(), "{name}");
    }
    assert_eq!(vm.find("no_such_counter"), None);
    assert_eq!(vm.find(""), None);
    let exits = vcpu.find("exits").unwrap();
    let before = vcpu.get(exits);
    for value in 0..100 {
        guest.write(&[Gfn(0x101)], value);
    }
    assert_eq!(vcpu.get(exits), before, "values change with a refresh only");
    vcpu.refresh().unwrap();
    vm.refresh().unwrap();
    let halts = vcpu.iter().map(|(_, value)| value).max().unwrap();
    assert!(vcpu.get(exits) >= before && halts >= 100, "{:?}", vcpu.iter().collect::<Vec<_>>());
    assert!(sizes.iter().all(|size| vm.get(*size) < 1 << 20));
}
