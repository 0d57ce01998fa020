//! The safety numbers of proto/vectors/client.json, which docs/client.md describes.

use qpq_client::{IdentityKey, fingerprint, safety_number};
use serde_json::Value;

fn key(vector: &Value) -> IdentityKey {
    let bytes = hex::decode(vector.as_str().unwrap()).unwrap();
    IdentityKey::try_from(&bytes[..]).unwrap()
}

#[test]
fn safety_numbers_are_as_in_the_vectors() {
    let vectors = include_str!("../../../../proto/vectors/client.json");
    let vectors: Value = serde_json::from_str(vectors).unwrap();
    let vectors = vectors["safety_numbers"].as_array().unwrap();
    assert!(!vectors.is_empty());
    for vector in vectors {
        let (one, other) = (key(&vector["one"]), key(&vector["other"]));
        assert_eq!(fingerprint(&one), vector["fingerprint_of_one"]);
        assert_eq!(safety_number(&one, &other), vector["safety_number"]);
    }
}
