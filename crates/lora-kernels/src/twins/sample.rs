//! [`crate::Argmax`], one row at a time.

/// The likeliest id of a row of logits that `allowed` (a bit for each id, lowest first) lets through, the lowest
/// on ties. NaN is never chosen; none is if there is nothing else.
pub fn argmax(logits: &[f32], allowed: Option<&[u32]>) -> Option<u32> {
    let mut best: Option<usize> = None;
    for (id, logit) in logits.iter().enumerate() {
        let may = allowed.is_none_or(|words| words[id / 32] >> (id % 32) & 1 == 1);
        if may && !logit.is_nan() && best.is_none_or(|best| *logit > logits[best]) {
            best = Some(id);
        }
    }
    best.map(|id| id as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_of_the_likeliest_that_may_come_out() {
        const LEAST: f32 = f32::NEG_INFINITY;
        assert_eq!(argmax(&[1., 3., 2., 3.], None), Some(1));
        assert_eq!(argmax(&[1., 3., 2., 3.], Some(&[0b1101])), Some(3));
        assert_eq!(argmax(&[f32::NAN, LEAST, LEAST], None), Some(1));
        assert_eq!(argmax(&[-1., -0., 0.], None), Some(1));
        assert_eq!(argmax(&[f32::NAN, 1.], Some(&[0b01])), None);
        let mut wide = vec![0.; 70];
        wide[33] = 1.;
        assert_eq!(argmax(&wide, Some(&[!0, 0b10, 0])), Some(33));
        assert_eq!(argmax(&wide, Some(&[1 << 31, 0b01, 0])), Some(31));
    }
}
