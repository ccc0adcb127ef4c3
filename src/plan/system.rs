//! What the system says of memory and disk. On other systems than Linux it says nothing.

use std::path::{Path, PathBuf};

/// Memory that this process may come to hold, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    /// With nothing else running: memory and swap, or the limit of a control group.
    pub(crate) total: u64,
    /// More than it holds now.
    pub(crate) available: u64,
}

/// `field` of this process's status, in bytes: `VmRSS`, memory that it holds, or `VmHWM`, the most that it ever held.
pub(crate) fn status_bytes(field: &str) -> Option<u64> {
    kibibytes(&std::fs::read_to_string("/proc/self/status").ok()?, field)
}

/// The field of lines such as `VmRSS:  123 kB`.
fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// What memory there is: the system's, or that of the tightest control group that this process is in.
pub(crate) fn room() -> Option<Room> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name| kibibytes(&text, name);
    let system = Room {
        total: field("MemTotal")? + field("SwapTotal").unwrap_or(0),
        available: field("MemAvailable")? + field("SwapFree").unwrap_or(0),
    };
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = group_folders(&groups, Path::new("/sys/fs/cgroup")).into_iter().filter_map(|folder| group(&folder));
    let tightest = |room: Room, limit: Room| Room {
        total: room.total.min(limit.total),
        available: room.available.min(limit.available),
    };
    Some(limits.fold(system, tightest))
}

/// Folders of the memory control groups of a process, by its /proc/self/cgroup, and of those that they are in.
fn group_folders(groups: &str, mount: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let root = match controllers {
            "" => mount.to_path_buf(),
            named if named.split(',').any(|name| name == "memory") => mount.join("memory"),
            _ => continue,
        };
        // Inside a container the path may be the host's, and only the root is there.
        let below = Path::new(path.trim_start_matches('/'));
        folders.extend(below.ancestors().map(|part| root.join(part)));
    }
    folders
}

/// Limit of a control group, of either version, and what is left of it: pages of files that nobody uses do not count.
fn group(folder: &Path) -> Option<Room> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let total = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let field = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    let files: u64 = field("total_inactive_file").or_else(|| field("inactive_file")).unwrap_or(0);
    Some(Room { total, available: total.saturating_sub(used.saturating_sub(files)) })
}

/// Bytes that this user may still write to the file system of `folder`.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(target_os = "linux")]
    return rustix::fs::statvfs(folder).ok().map(|there| there.f_bavail.saturating_mul(there.f_frsize));
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmPeak:\t  9 kB\nVmHWM:\t   4 kB\nVmRSS:\t     3 kB\nThreads:\t1\n";
        assert_eq!(kibibytes(text, "VmRSS"), Some(3072));
        assert_eq!(kibibytes(text, "VmHWM"), Some(4096));
        assert_eq!((kibibytes(text, "Vm"), kibibytes(text, "Threads")), (None, None));
    }

    #[test]
    fn the_tightest_group_counts_whatever_its_version() {
        let work = tempfile::tempdir().unwrap();
        let folders = group_folders("9:memory:/a/b\n8:pids:/c\n0::/d\n", work.path());
        let names = ["memory/a/b", "memory/a", "memory", "d", ""];
        assert_eq!(folders, names.map(|name| work.path().join(name)));
        for folder in &folders {
            std::fs::create_dir_all(folder).unwrap();
        }
        assert_eq!(group(&folders[0]), None);
        let write = |folder: &Path, name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write(&folders[0], "memory.limit_in_bytes", "1000\n");
        write(&folders[0], "memory.usage_in_bytes", "600\n");
        write(&folders[0], "memory.stat", "inactive_file 1\ntotal_inactive_file 100\n");
        assert_eq!(group(&folders[0]), Some(Room { total: 1000, available: 500 }));
        write(&folders[3], "memory.max", "max\n");
        write(&folders[3], "memory.current", "600\n");
        assert_eq!(group(&folders[3]), None);
        write(&folders[3], "memory.max", "700\n");
        write(&folders[3], "memory.stat", "anon 5\ninactive_file 50\n");
        assert_eq!(group(&folders[3]), Some(Room { total: 700, available: 150 }));
    }

    #[test]
    fn the_system_has_room() {
        if cfg!(target_os = "linux") {
            let room = room().unwrap();
            assert!(room.available > 0 && room.total >= status_bytes("VmRSS").unwrap());
            assert!(free_bytes(Path::new("/proc/self")).is_some());
        }
    }
}
