//! What the system says of this process, with all that runs in it: for tests that run [`alone`](super::alone). On other systems than Linux
//! it says nothing.

use std::fs::read_to_string;
use std::time::Duration;

/// The most memory that it ever held, in KiB.
pub fn peak_kib() -> u64 {
    let Ok(status) = read_to_string("/proc/self/status") else { return 0 };
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Processor time so far, that of threads which have ended included (proc_pid_stat(5): fields 14 and 15, in hundredths of a second on
/// every Linux).
pub fn processor_time() -> Duration {
    let Ok(stat) = read_to_string("/proc/self/stat") else { return Duration::ZERO };
    // The name, in parentheses, may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    Duration::from_millis([11, 12].map(|field: usize| fields[field].parse::<u64>().unwrap() * 10).iter().sum())
}
