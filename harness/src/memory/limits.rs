//! The memory that limits leave to this process: those of the control groups around it, as containers and schedulers set
//! them, and that of its addresses (`ulimit -v`).

use super::kib_of;
use std::fs::read_to_string;
use std::path::Path;

/// The fewest bytes that a limit leaves, if there is one.
pub fn left() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    [in_groups(Path::new("/sys/fs/cgroup"), &groups), of_addresses()].into_iter().flatten().min()
}

fn of_addresses() -> Option<u64> {
    // In bytes, or "unlimited".
    let most = kib_of("/proc/self/limits", "Max address space")?;
    Some(most.saturating_sub(kib_of("/proc/self/status", "VmSize:")? * 1024))
}

/// The files of a version of control groups: a limit, what is used of it, and what in that is the page cache's, which is
/// given back when it is needed.
struct Version {
    limit: &'static str,
    used: &'static str,
    cache: [&'static str; 2],
}

const ONE: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const TWO: Version = Version { limit: "memory.max", used: "memory.current", cache: ["inactive_file", "active_file"] };

/// `groups` is /proc/self/cgroup: "0::/a/b" in version 2, "4:memory:/a/b" in version 1.
fn in_groups(root: &Path, groups: &str) -> Option<u64> {
    let of_line = |line: &str| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        let (root, version) = match controllers {
            "" => (root.to_path_buf(), TWO),
            _ if controllers.split(',').any(|one| one == "memory") => (root.join("memory"), ONE),
            _ => return None,
        };
        // In a container the path may be the host's; its own group is the root there.
        let own = root.join(path.trim_start_matches('/'));
        let around = own.ancestors().take_while(|group| group.starts_with(&root));
        around.filter_map(|group| left_of(group, &version)).min()
    };
    groups.lines().filter_map(of_line).min()
}

fn left_of(group: &Path, version: &Version) -> Option<u64> {
    let number = |name| read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
    let entries = stat.lines().filter_map(|line| line.split_once(' '));
    let cache = entries.filter(|(key, _)| version.cache.contains(key)).filter_map(|(_, n)| n.parse::<u64>().ok());
    let (limit, used) = (number(version.limit)?, number(version.used)?);
    Some(limit.saturating_sub(used.saturating_sub(cache.sum())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_limit_counts() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |group: &str, files: &[(&str, &str)]| {
            std::fs::create_dir_all(scratch.path().join(group)).unwrap();
            files.iter().for_each(|(name, text)| std::fs::write(scratch.path().join(group).join(name), text).unwrap());
        };
        let left = |groups: &str| in_groups(scratch.path(), groups);
        assert_eq!(left("0::/\n"), None);
        write("job", &[("memory.max", "1000\n"), ("memory.current", "400\n")]);
        write("job/step", &[("memory.max", "max\n"), ("memory.current", "300\n")]);
        assert_eq!(left("0::/job/step\n"), Some(600));
        write("job", &[("memory.stat", "anon 50\ninactive_file 100\nactive_file 20\n")]);
        assert_eq!(left("3:cpu:/x\n0::/job\n"), Some(720));
        write("memory/a", &[("memory.limit_in_bytes", "500\n"), ("memory.usage_in_bytes", "600\n")]);
        assert_eq!(left("4:memory:/a/b\n0::/job\n"), Some(0));
        assert_eq!(left("4:cpu,memory:/b\n"), None);
        assert_eq!(left("\n::\n4:memory\n"), None);
    }
}
