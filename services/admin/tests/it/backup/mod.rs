//! `backup`, `verify`, `restore` and `mark-restored`.

mod cluster;
mod node;
mod repeated;

use std::{fs, path::Path};

/// Damages each file of a backup in several ways. `verify` must name the file each time.
fn assert_damage_is_found(backup: &Path, verify: impl Fn() -> String) {
    let mut files = Vec::new();
    let mut directories = vec![backup.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        let good = fs::read(&file).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let cut = good[..good.len() - 1].to_vec();
        let name = file.file_name().unwrap().to_str().unwrap();
        for damaged in [Some(flipped), Some(cut), None] {
            match &damaged {
                Some(damaged) => fs::write(&file, damaged).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            let stderr = verify();
            // A damaged hash of the manifest is reported as damage of the manifest.
            assert!(stderr.contains(name) || stderr.contains("manifest.json"), "{name}: {stderr}");
        }
        fs::write(&file, good).unwrap();
    }
    fs::write(backup.join("another"), "file").unwrap();
    let stderr = verify();
    assert!(stderr.contains("not part of the backup: another"), "{stderr}");
    fs::remove_file(backup.join("another")).unwrap();
}
