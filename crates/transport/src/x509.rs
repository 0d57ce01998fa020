//! The fields of a certificate that rustls does not return, read with `x509-parser`.

use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// Returns the `notAfter` of a certificate in DER, in Unix seconds, or `None` if the certificate is
/// malformed.
pub(crate) fn not_after(certificate: &[u8]) -> Option<i64> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// Returns the DNS names among the subject's alternative names of a certificate in DER, in lower
/// case.
pub(crate) fn dns_names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let dns_name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(dns_name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(year: i32, month: u8, day: u8) -> Vec<u8> {
        let names = ["Example.org", "127.0.0.1", "*.example.net"].map(str::to_owned);
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.not_after = rcgen::date_time_ymd(year, month, day);
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_of_validity_is_read_in_both_encodings() {
        assert_eq!(not_after(&certificate(2030, 1, 1)), Some(1_893_456_000));
        assert_eq!(not_after(&certificate(2028, 2, 29)), Some(1_835_395_200));
        assert_eq!(not_after(&certificate(2000, 3, 1)), Some(951_868_800));
        // From 2050 on, certificates use GeneralizedTime (RFC 5280 §4.1.2.5).
        assert_eq!(not_after(&certificate(2050, 12, 31)), Some(2_556_057_600));
        assert_eq!(not_after(&certificate(4096, 1, 1)), Some(67_090_118_400));
    }

    #[test]
    fn only_dns_names_are_listed() {
        assert_eq!(dns_names(&certificate(2030, 1, 1)), ["example.org", "*.example.net"]);
    }

    #[test]
    fn a_truncated_certificate_has_no_fields() {
        let whole = certificate(2030, 1, 1);
        for len in 0..whole.len() {
            assert_eq!(not_after(&whole[..len]), None, "{len}");
            assert_eq!(dns_names(&whole[..len]), [""; 0], "{len}");
        }
    }
}
