use std::fs;

use super::*;

const ROWS: Table = Table::new(200);
const ITEMS: Table = Table::new(201);

fn key(byte: u8) -> VaultKey {
    VaultKey::from_bytes(&[byte; 48])
}

fn empty(_: &Database) -> Result<(), DatabaseError> {
    Ok(())
}

#[test]
fn rows_and_items_survive_reopening_and_need_their_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let database = Database::create(&path, &key(1), |database| {
        database.put(ROWS, b"one", Some(b"lane"), b"first")
    })
    .unwrap();
    let number =
        database.append(ITEMS, NewItem { open: true, ..NewItem::default() }, b"x").unwrap();
    drop(database);
    assert_eq!(Database::open(&path, &key(2)).unwrap_err(), DatabaseError::WrongKey);
    assert_eq!(Database::salt(&path).unwrap(), vault::salt_of(&vault::seal(&key(1), b"")).unwrap());
    let database = Database::open(&path, &key(1)).unwrap();
    assert_eq!(&**database.get(ROWS, b"one").unwrap().unwrap(), b"first");
    assert_eq!(database.in_lane(ROWS, b"lane").unwrap().len(), 1);
    assert_eq!(&*database.item(ITEMS, number).unwrap().unwrap().value, b"x");
    assert_eq!(database.get(ROWS, b"two").unwrap(), None);
    assert!(fs::read_dir(directory.path()).unwrap().all(|file| {
        use std::os::unix::fs::PermissionsExt as _;
        file.unwrap().metadata().unwrap().permissions().mode() & 0o777 == 0o600
    }));
}

#[test]
fn a_number_is_never_used_twice() {
    let database = Database::in_memory();
    let first = database.append(ITEMS, NewItem::default(), b"a").unwrap();
    database.remove_item(ITEMS, first).unwrap();
    assert_eq!(database.append(ITEMS, NewItem::default(), b"b").unwrap(), first + 1);
    database.skip_numbers(ITEMS, 40).unwrap();
    assert_eq!(database.append(ITEMS, NewItem::default(), b"c").unwrap(), 40);
    assert!(database.insert(ITEMS, u64::MAX, NewItem::default(), b"d").is_err());
}

#[test]
fn a_failed_transaction_changes_nothing() {
    let database = Database::in_memory();
    let failed: Result<(), _> = database.write(|| {
        database.put(ROWS, b"one", None, b"1")?;
        Err(DatabaseError::Full)
    });
    assert_eq!(failed, Err(DatabaseError::Full));
    assert_eq!(database.get(ROWS, b"one").unwrap(), None);
    database.write(|| database.put(ROWS, b"one", None, b"2")).unwrap();
    assert_eq!(&**database.get(ROWS, b"one").unwrap().unwrap(), b"2");
}

#[test]
fn a_value_opens_only_in_its_own_place() {
    let database = Database::in_memory();
    database.put(ROWS, b"one", None, b"1").unwrap();
    database.put(ROWS, b"two", None, b"2").unwrap();
    let swap = "UPDATE rows SET value = (SELECT value FROM rows AS other
                WHERE other.rowid <> rows.rowid) WHERE rowid = 1";
    database.execute_batch(swap).unwrap();
    assert!(matches!(database.get(ROWS, b"one"), Err(DatabaseError::Damaged(_))));
}

#[test]
fn neither_keys_nor_values_are_in_the_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let database = Database::create(&path, &key(1), empty).unwrap();
    database.put(ROWS, b"a secret key", Some(b"a secret lane"), b"a secret value").unwrap();
    let new = NewItem { key: Some(b"a secret name"), lane: Some(b"a secret lane"), open: true };
    database.append(ITEMS, new, b"a secret item").unwrap();
    database.note_digest(&[b's'; 32], 1).unwrap();
    let mut files = 0;
    for file in fs::read_dir(directory.path()).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!has(b"a secret") && !has(&[b's'; 16]));
        files += 1;
    }
    assert_eq!(files, 3, "the database, its write-ahead log and its index");
}

#[test]
fn damage_newer_versions_and_full_disks_have_errors_of_their_own() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let database = Database::create(&path, &key(1), empty).unwrap();
    database.limit_pages(1).unwrap();
    let large = vec![1; 1 << 20];
    assert_eq!(
        database.write(|| database.put(ROWS, b"one", None, &large)),
        Err(DatabaseError::Full)
    );
    assert_eq!(database.get(ROWS, b"one").unwrap(), None);
    database.execute_batch("PRAGMA user_version = 9").unwrap();
    drop(database);
    assert_eq!(Database::open(&path, &key(1)).unwrap_err(), DatabaseError::Newer);
    fs::write(&path, b"rubbish".repeat(1000)).unwrap();
    assert!(matches!(Database::open(&path, &key(1)), Err(DatabaseError::Damaged(_))));
    fs::remove_file(&path).unwrap();
    assert!(matches!(Database::open(&path, &key(1)), Err(DatabaseError::Io(_))));
}

#[test]
fn two_connections_see_each_others_commits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let one = Database::create(&path, &key(1), empty).unwrap();
    let two = Database::open(&path, &key(1)).unwrap();
    for number in 0..10_u64 {
        let (writer, reader) = if number % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let appended = writer
            .write(|| writer.append(ITEMS, NewItem::default(), &number.to_be_bytes()))
            .unwrap();
        assert_eq!(appended, number);
        assert_eq!(reader.items_after(ITEMS, None, 100).unwrap().len() as u64, number + 1);
    }
}

#[test]
fn digests_are_forgotten_by_their_day() {
    let database = Database::in_memory();
    assert!(database.note_digest(&[1; 32], 10).unwrap());
    assert!(!database.note_digest(&[1; 32], 20).unwrap());
    assert!(database.note_digest(&[2; 32], 11).unwrap());
    assert_eq!(database.forget_digests(11, 10).unwrap(), 1);
    assert!(!database.knows_digest(&[1; 32]).unwrap());
    assert!(database.knows_digest(&[2; 32]).unwrap());
}

#[test]
fn a_next_key_opens_the_database_and_is_the_only_one_from_then_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let fill = |database: &Database| database.put(ROWS, b"one", None, b"first");
    let first = |database: &Database| database.get(ROWS, b"one").unwrap().unwrap().to_vec();
    let database = Database::create(&path, &key(1), fill).unwrap();
    database.prepare_key(&key(1), &key(2)).unwrap();
    database.prepare_key(&key(1), &key(3)).unwrap();
    drop(database);
    assert_eq!(first(&Database::open(&path, &key(1)).unwrap()), b"first");
    assert_eq!(Database::open(&path, &key(2)).unwrap_err(), DatabaseError::WrongKey);
    assert_eq!(first(&Database::open(&path, &key(3)).unwrap()), b"first");
    assert_eq!(Database::open(&path, &key(1)).unwrap_err(), DatabaseError::WrongKey);
    let database = Database::open(&path, &key(3)).unwrap();
    database.prepare_key(&key(3), &key(4)).unwrap();
    database.forget_next_key().unwrap();
    assert_eq!(Database::open(&path, &key(4)).unwrap_err(), DatabaseError::WrongKey);
    database.replace_key(&key(3), &key(5)).unwrap();
    drop(database);
    assert_eq!(Database::open(&path, &key(3)).unwrap_err(), DatabaseError::WrongKey);
    assert_eq!(first(&Database::open(&path, &key(5)).unwrap()), b"first");
}
