//! How the tests of all crates compare results with their reference; each includes this file as a module.

/// Asserts that each element of `got` is within `tolerance` of `want`, relative to the largest `want` or to `least`, the
/// size of terms that cancel in smaller results.
#[track_caller]
pub fn assert_close<W: Copy + Into<f64>>(what: &str, got: &[f32], want: &[W], tolerance: f64, least: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let scale = want.iter().fold(least, |scale, &want| scale.max(want.into().abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (f64::from(got), want.into());
        // Written so that NaN fails.
        assert!(
            (got - want).abs() <= tolerance * scale,
            "{what}[{i}]: expected {want}, found {got}: {:.1e} of {scale}, the largest",
            (got - want).abs() / scale
        );
    }
}
