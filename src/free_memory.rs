//! How much memory this process may still take: what is free on the machine and in the control
//! groups that it belongs to.

use std::fs;
use std::path::Path;

/// Bytes that this process may take in all: what it has now and what is free, less a tenth of that.
/// Nothing where the system does not say.
pub fn usable() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let resident = kib(&status, "VmRSS:")?;
    let machine = kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = free_in_groups(Path::new("/sys/fs/cgroup"), &membership);
    Some((resident + groups.map_or(machine, |free| free.min(machine))) / 10 * 9)
}

/// Whether this process may take so many bytes more; yes where the system does not say.
pub fn has_room(bytes: usize) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = kib(&status, "VmRSS:").unwrap_or(0);
    usable().is_none_or(|usable| resident + bytes <= usable)
}

/// A line's number of KiB, in bytes.
fn kib(text: &str, key: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.split_whitespace().next()?.parse::<usize>().ok()? << 10)
}

/// The least that is free in a control group of the process; nothing if none has a limit.
///
/// `membership` is `/proc/self/cgroup`: a line `0::/path` (version 2), or one that names `memory`
/// (version 1).
fn free_in_groups(root: &Path, membership: &str) -> Option<usize> {
    let of = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (controllers, path) = (fields.nth(1)?, fields.next()?);
        let (root, files) = match controllers {
            "" => (root.to_path_buf(), ["memory.max", "memory.current", "inactive_file"]),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let files = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
                (root.join("memory"), [files[0], files[1], "total_inactive_file"])
            }
            _ => return None,
        };
        // the path may be that outside a container, whose own group is then the root
        let group = root.join(path.trim_start_matches('/'));
        let groups = group.ancestors().take_while(|group| group.starts_with(&root));
        groups.filter_map(|group| free_in_group(group, files)).min()
    };
    membership.lines().filter_map(of).min()
}

fn free_in_group(group: &Path, [limit, usage, reclaimable]: [&str; 3]) -> Option<usize> {
    let number = |name: &str| -> Option<usize> {
        fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse().ok());
    Some(limit.saturating_sub(usage.saturating_sub(cached.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_little_and_none_for_more_than_there_is() {
        assert!(has_room(1 << 10));
        assert!(usable().is_none() || !has_room(usize::MAX / 2));
    }

    #[test]
    fn the_tightest_group_counts_and_cached_files_are_free() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let free = |membership: &str| free_in_groups(dir.path(), membership);
        assert_eq!(free("0::/a/b\n"), None);
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 400\ninactive_file 300\n");
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "700\n");
        assert_eq!(free("0::/a/b\n"), Some(600));
        assert_eq!(free("0::/elsewhere\n"), None);
        write("memory/c/memory.limit_in_bytes", "5000\n");
        write("memory/c/memory.usage_in_bytes", "6000\n");
        assert_eq!(free("7:cpu:/\n4:cpuset,memory:/c/d\n"), Some(0));
    }

    #[test]
    fn this_machine_has_memory() {
        if cfg!(target_os = "linux") {
            assert!(usable().unwrap() > 1 << 20);
        }
    }
}
