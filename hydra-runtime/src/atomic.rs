//! Files and folders that are replaced whole or not at all.
//!
//! Each file is written under a temporary name in its own folder, flushed to the disk, and then renamed. Of several files all are
//! written before the first is renamed, so a full disk leaves what was there before. A [`NewFolder`] or [`NewFile`] is filled under
//! a temporary name and renamed when it is complete.
//!
//! Temporary names begin with [`PREFIX`] and the process's id and are made exclusively. Each is locked while its process lives,
//! so [`remove_leftovers`] can tell what a killed process left from what another one is writing. It is called before anything is
//! written.

use crate::{Error, Result};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::{Builder, NamedTempFile, TempDir, TempPath};

/// What temporary names begin with; the process's id and a hyphen follow.
pub const PREFIX: &str = ".hydra-tmp-";

/// Replaces one file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_all_atomically(&[(path.to_path_buf(), bytes)])
}

/// Replaces several files; none before all of them are on the disk.
pub fn write_all_atomically(files: &[(PathBuf, &[u8])]) -> Result<()> {
    let mut written = Vec::with_capacity(files.len());
    for (path, bytes) in files {
        let mut temporary = temporary(path)?;
        let flushed = temporary.write_all(bytes).and_then(|()| temporary.as_file().sync_all());
        flushed.map_err(|source| io(path, source))?;
        written.push((path, temporary));
    }
    if let Some((folder, _)) = files.iter().find(|(path, _)| path.is_dir()) {
        return Err(io(folder, ErrorKind::IsADirectory.into()));
    }
    for (path, temporary) in written {
        temporary.persist(path).map_err(|error| io(path, error.error))?;
    }
    files.iter().for_each(|(path, _)| flush_parent(path));
    Ok(())
}

/// Replaces one file with what `fill` writes at the path that it is given, for what should not be in memory as a whole.
pub fn fill_atomically(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let at = |source| io(path, source);
    let folder = TemporaryFolder::new(path, &Builder::new())?;
    let filled = folder.path().join("file");
    // The name that the user knows.
    fill(&filled).map_err(|error| match error {
        Error::Io { path: at, source } if at == filled => io(path, source),
        other => other,
    })?;
    File::open(&filled).and_then(|file| file.sync_all()).map_err(at)?;
    fs::rename(&filled, path).map_err(at)?;
    flush_parent(path);
    Ok(())
}

/// Removes the temporary files and folders in `folder` that killed processes left. What can't be locked or removed stays: this
/// is tidying up, and no reason to fail.
pub fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_temporary(&entry.file_name())) {
        // A link isn't followed, and a pipe isn't opened, which would wait for its writer.
        let Ok(kind) = entry.file_type() else { continue };
        if !kind.is_file() && !kind.is_dir() {
            continue;
        }
        let path = entry.path();
        // The lock is held until the entry is gone: whoever has just made it sees that, and makes another.
        let Ok(lock) = File::open(&path) else { continue };
        if lock.try_lock().is_ok() {
            let _ = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Whether a file's or folder's name is one of those that are given here before it gets its own.
pub fn is_temporary(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(PREFIX)
}

/// Fails if [`write_atomically`] could not even begin a file at `path`; leaves nothing there.
pub fn try_beside(path: &Path) -> Result<()> {
    temporary(path).map(drop)
}

/// A folder with a temporary name, which is locked until it is dropped, and then removed with all that is in it.
struct TemporaryFolder {
    folder: TempDir,
    /// Where folders can be locked.
    _lock: Option<File>,
}

impl TemporaryFolder {
    /// In the folder of `path`.
    fn new(path: &Path, builder: &Builder<'_, '_>) -> Result<Self> {
        let (parent, prefix) = (parent(path)?, prefix());
        let mut builder = builder.clone();
        builder.prefix(&prefix);
        remove_leftovers(parent);
        loop {
            let folder = builder.tempdir_in(parent).map_err(|source| io(path, source))?;
            let lock = File::open(&folder).ok().filter(|folder| folder.lock().is_ok());
            if folder.path().exists() {
                return Ok(Self { folder, _lock: lock });
            }
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A folder that is not there until it is complete. Nothing of it stays if it is dropped before that.
pub struct NewFolder {
    temporary: TemporaryFolder,
    destination: PathBuf,
}

impl NewFolder {
    /// Begins a folder that will be at `destination`, where there is nothing or an empty folder.
    pub fn begin(destination: &Path) -> Result<Self> {
        let at = |source| io(destination, source);
        // A link can't be renamed over: the folder that it leads to is meant.
        if fs::symlink_metadata(destination).is_ok_and(|there| there.is_symlink()) {
            return Self::begin(&fs::canonicalize(destination).map_err(at)?);
        }
        let occupied = |found: &str| {
            Err(Error::Invalid(format!("{}: {found}: expected a new or empty folder", destination.display())))
        };
        match fs::read_dir(destination).map(|mut entries| entries.next().is_some()) {
            Ok(true) => return occupied("not empty"),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return occupied("a file"),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(at(error)),
            _ => {}
        }
        let parent = parent(destination)?;
        fs::create_dir_all(parent).map_err(at)?;
        let mut builder = Builder::new();
        #[cfg(unix)]
        builder.permissions(unix_mode(0o777));
        Ok(Self { temporary: TemporaryFolder::new(destination, &builder)?, destination: destination.into() })
    }

    /// Where to write its files.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Where it will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Flushes its files and puts it at its destination.
    pub fn keep(self) -> Result<()> {
        let keep = || {
            for entry in fs::read_dir(self.path())? {
                File::open(entry?.path())?.sync_all()?;
            }
            fs::rename(self.path(), &self.destination)
        };
        keep().map_err(|source| io(&self.destination, source))?;
        // It is no longer where it would be removed.
        let _ = self.temporary.folder.keep();
        flush_parent(&self.destination);
        Ok(())
    }
}

/// A file that is not there until it is complete; nothing is replaced by it, and nothing of it stays if it is dropped before that.
pub struct NewFile {
    temporary: TemporaryFolder,
    path: PathBuf,
    destination: PathBuf,
}

impl NewFile {
    /// Begins a file that will be at `destination`, where there is nothing, in a folder that is made if need be.
    pub fn begin(destination: &Path) -> Result<Self> {
        if fs::symlink_metadata(destination).is_ok() {
            return Err(Error::Invalid(format!(
                "{}: already there: expected a new file's name",
                destination.display()
            )));
        }
        let folder = parent(destination)?;
        fs::create_dir_all(folder).map_err(|source| io(destination, source))?;
        let temporary = TemporaryFolder::new(destination, &Builder::new())?;
        let path = temporary.path().join("file");
        Ok(Self { temporary, path, destination: destination.into() })
    }

    /// Where to write it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to remove if the process ends before it is complete.
    pub fn temporary(&self) -> &Path {
        self.temporary.path()
    }

    /// Flushes it and puts it at its destination.
    pub fn keep(self) -> Result<()> {
        let kept = File::open(&self.path).and_then(|file| file.sync_all());
        let keep =
            |()| TempPath::try_from_path(&self.path)?.persist_noclobber(&self.destination).map_err(|error| error.error);
        kept.and_then(keep).map_err(|source| io(&self.destination, source))?;
        flush_parent(&self.destination);
        Ok(())
    }
}

/// An error at `path`, and not at the temporary name with which all of the crate tempfile's errors end.
fn io(path: &Path, source: std::io::Error) -> Error {
    let source = match source.to_string().split_once(" at path \"") {
        Some((said, _)) => std::io::Error::new(source.kind(), said),
        None => source,
    };
    Error::Io { path: path.into(), source }
}

fn prefix() -> String {
    format!("{PREFIX}{}-", std::process::id())
}

/// The folder in which a file is, or will be.
fn parent(path: &Path) -> Result<&Path> {
    match (path.file_name(), path.parent()) {
        (Some(_), Some(parent)) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        (Some(_), Some(parent)) => Ok(parent),
        _ => Err(Error::Invalid(format!("{}: not a file's name", path.display()))),
    }
}

/// An empty file in the folder of `path`, locked as long as it is open.
fn temporary(path: &Path) -> Result<NamedTempFile> {
    let (parent, prefix) = (parent(path)?, prefix());
    let mut builder = Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    builder.permissions(unix_mode(0o666));
    remove_leftovers(parent);
    loop {
        let file = builder.tempfile_in(parent).map_err(|source| io(path, source))?;
        // Some file systems have no locks; nothing is removed there, either.
        let _ = file.as_file().lock();
        if file.path().exists() {
            return Ok(file);
        }
    }
}

/// What the process's umask leaves of it is what any other program's files would have.
#[cfg(unix)]
fn unix_mode(mode: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

/// A rename lasts once its folder is flushed. Some systems can't open folders, and have nothing to flush then.
fn flush_parent(path: &Path) {
    if let Ok(Ok(folder)) = parent(path).map(File::open) {
        let _ = folder.sync_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn all_files_or_none() {
        let dir = tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write_all_atomically(&[(path("a"), b"1"), (path("b"), b"2")]).unwrap();
        fs::create_dir(path("folder")).unwrap();
        // Neither a folder that isn't there nor one in a file's place.
        for second in ["missing/c", "folder"] {
            assert!(write_all_atomically(&[(path("a"), b"3"), (path(second), b"4")]).is_err());
        }
        assert_eq!(fs::read(path("a")).unwrap(), b"1");
        assert_eq!(names(dir.path()), ["a", "b", "folder"]);
    }

    #[cfg(unix)]
    #[test]
    fn errors_name_the_file_alone() {
        let path = Path::new("/dev/null/a");
        let wanted = "/dev/null/a: Not a directory (os error 20)";
        assert_eq!(write_atomically(path, b"").unwrap_err().to_string(), wanted);
        assert_eq!(fill_atomically(path, |_| Ok(())).unwrap_err().to_string(), wanted);
    }

    #[test]
    fn a_new_file_appears_whole_and_replaces_nothing() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("new/a");
        let file = NewFile::begin(&path).unwrap();
        write_atomically(file.path(), b"1").unwrap();
        remove_leftovers(&dir.path().join("new"));
        assert!(!path.exists());
        file.keep().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"1");
        assert!(NewFile::begin(&path).is_err());
        drop(NewFile::begin(&dir.path().join("new/b")).unwrap());
        assert_eq!(names(&dir.path().join("new")), ["a"]);
    }

    #[test]
    fn a_file_that_could_not_be_filled_stays_as_it_was() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("a");
        let fill = |text: &'static str| {
            move |path: &Path| fs::write(path, text).map_err(|source| Error::Io { path: path.into(), source })
        };
        let beside_another = |path: &Path| {
            // Another process tidies up meanwhile.
            remove_leftovers(dir.path());
            fill("1")(path)
        };
        fill_atomically(&path, beside_another).unwrap();
        let seen = fill_atomically(&path, |path| {
            let folder = path.parent().unwrap();
            let name = folder.file_name().unwrap().to_str().unwrap();
            assert!(name.starts_with(&format!("{PREFIX}{}-", std::process::id())), "{name}");
            fill("2")(path)?;
            Err(Error::Invalid("stopped".into()))
        });
        assert!(seen.is_err() && fs::read(&path).unwrap() == b"1");
        let full = |path: &Path| Err(io(path, ErrorKind::StorageFull.into()));
        let said = fill_atomically(&path, full).unwrap_err().to_string();
        assert_eq!(said, io(&path, ErrorKind::StorageFull.into()).to_string());
        assert_eq!(names(dir.path()), ["a"]);
        assert!(write_atomically(Path::new("/"), b"").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn what_the_dead_left_is_removed_and_what_the_living_write_is_not() {
        let dir = tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path(".hydra-tmp-1-dead"), "x").unwrap();
        fs::create_dir(path(".hydra-tmp-1-folder")).unwrap();
        fs::write(path(".hydra-tmp-1-folder/shard"), "x").unwrap();
        fs::write(path("mine"), "x").unwrap();
        let writing = temporary(&path("other")).unwrap();
        let merging = NewFolder::begin(&path("merged")).unwrap();
        let [file, folder] = [writing.path(), merging.path()].map(|path| path.file_name().unwrap().to_str().unwrap());
        let mut left = vec![file.to_string(), folder.to_string(), "mine".to_string()];
        left.sort();
        assert_eq!(names(dir.path()), left, "a new folder removes what is dead beside it");
        remove_leftovers(dir.path());
        assert_eq!(names(dir.path()), left);
        merging.keep().unwrap();
        writing.persist(path("other")).unwrap();
        assert_eq!(names(dir.path()), ["merged", "mine", "other"]);
        let fill = |path: &Path| fs::write(path, "2").map_err(|source| io(path, source));
        let writes: [&dyn Fn() -> Result<()>; 2] =
            [&|| write_atomically(&path("mine"), b"2"), &|| fill_atomically(&path("mine"), fill)];
        for write in writes {
            fs::create_dir(path(".hydra-tmp-1-dead")).unwrap();
            write().unwrap();
            assert_eq!(names(dir.path()), ["merged", "mine", "other"]);
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_files_and_folders_are_leftovers() {
        let dir = tempdir().unwrap();
        let [pipe, link] = [".hydra-tmp-1-pipe", ".hydra-tmp-1-link"].map(|name| dir.path().join(name));
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::os::unix::fs::symlink("..", &link).unwrap();
        // Opening the pipe would wait for its writer.
        remove_leftovers(dir.path());
        assert_eq!(names(dir.path()), [".hydra-tmp-1-link", ".hydra-tmp-1-pipe"]);
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_any_files() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempdir().unwrap();
        let [plain, written, filled] = ["plain", "written", "filled"].map(|name| dir.path().join(name));
        File::create(&plain).unwrap();
        write_atomically(&written, b"1").unwrap();
        let fill = |path: &Path| fs::write(path, "1").map_err(|source| io(path, source));
        fill_atomically(&filled, fill).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!([mode(&written), mode(&filled)], [mode(&plain); 2]);
        let (made, folder) = (dir.path().join("made"), dir.path().join("folder"));
        fs::create_dir(&made).unwrap();
        NewFolder::begin(&folder).unwrap().keep().unwrap();
        assert_eq!(mode(&folder), mode(&made));
    }
}
