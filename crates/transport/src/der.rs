//! The one thing that we need from inside a certificate and rustls does not tell: when it expires.

/// The `notAfter` of a certificate given in DER, in Unix seconds; `None` if it cannot be read.
///
/// RFC 5280 §4.1: `Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version OPTIONAL,
/// serialNumber, signature, issuer, validity SEQUENCE { notBefore, notAfter }, .. }, .. }`.
pub(crate) fn not_after(certificate: &[u8]) -> Option<i64> {
    let (_, certificate, _) = element(certificate)?;
    let (_, mut fields, _) = element(certificate)?;
    if fields.first() == Some(&VERSION) {
        fields = element(fields)?.2;
    }
    for _serial_signature_issuer in 0..3 {
        fields = element(fields)?.2;
    }
    let (_, validity, _) = element(fields)?;
    let (_, _, validity) = element(validity)?;
    let (tag, time, _) = element(validity)?;
    unix_seconds(tag, time)
}

const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// Splits the first element off: its tag, its content, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, der) = der.split_first()?;
    let (first, mut der) = der.split_first()?;
    let mut len = usize::from(*first);
    if len >= 0x80 {
        let (bytes, rest) = der.split_at_checked(len - 0x80)?;
        if bytes.len() > 4 {
            return None;
        }
        len = bytes.iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
        der = rest;
    }
    let (content, rest) = der.split_at_checked(len)?;
    Some((*tag, content, rest))
}

/// `YYMMDDHHMMSSZ` with years from 1950 to 2049, or `YYYYMMDDHHMMSSZ` (RFC 5280 §4.1.2.5).
fn unix_seconds(tag: u8, time: &[u8]) -> Option<i64> {
    let time = std::str::from_utf8(time).ok()?.strip_suffix('Z')?;
    if !time.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (year, time) = match tag {
        UTC_TIME => {
            let (year, time) = time.split_at_checked(2)?;
            let year: i64 = year.parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, time)
        }
        GENERALIZED_TIME => {
            let (year, time) = time.split_at_checked(4)?;
            (year.parse().ok()?, time)
        }
        _ => return None,
    };
    if time.len() != 10 {
        return None;
    }
    let number = |at: usize| time[at..at + 2].parse::<i64>().ok();
    let days = days_since_1970(year, number(0)?, number(2)?);
    Some(((days * 24 + number(4)?) * 60 + number(6)?) * 60 + number(8)?)
}

/// Days in the Gregorian calendar, counting years from March so that the leap day is a year's last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days_before_month = (153 * month + 2) / 5;
    365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + days_before_month
        + day
        - 1
        - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(year: i32, month: u8, day: u8) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["example.org".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, month, day);
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_of_validity_is_found() {
        assert_eq!(not_after(&certificate(2030, 1, 1)), Some(1_893_456_000));
        assert_eq!(not_after(&certificate(2028, 2, 29)), Some(1_835_395_200));
        assert_eq!(not_after(&certificate(2000, 3, 1)), Some(951_868_800));
        // From 2050 on, certificates use the other form.
        assert_eq!(not_after(&certificate(2050, 12, 31)), Some(2_556_057_600));
    }

    #[test]
    fn times_are_read_to_the_second() {
        assert_eq!(unix_seconds(UTC_TIME, b"700101000001Z"), Some(1));
        assert_eq!(unix_seconds(UTC_TIME, b"691231235959Z"), Some(-1));
        assert_eq!(unix_seconds(GENERALIZED_TIME, b"20380119031408Z"), Some(1 << 31));
        assert_eq!(unix_seconds(GENERALIZED_TIME, b"20380119031408"), None);
        assert_eq!(unix_seconds(UTC_TIME, b"+00101000001Z"), None);
    }

    #[test]
    fn what_is_cut_short_has_no_end() {
        let whole = certificate(2030, 1, 1);
        for len in 0..whole.len() {
            assert_eq!(not_after(&whole[..len]), None);
        }
    }
}
