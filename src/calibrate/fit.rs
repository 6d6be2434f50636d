//! Non-negative least squares.

use nalgebra::{DMatrix, DVector};

/// The `x ≥ 0` that minimises `‖a·x − b‖`, by Lawson and Hanson's active-set method (*Solving Least
/// Squares Problems*, 1974, chapter 23). `a` is `[rows, columns]`. Costs cannot be negative, and a
/// piecewise-linear function with non-negative slopes is monotone.
pub fn nnls(a: &DMatrix<f64>, b: &DVector<f64>) -> DVector<f64> {
    // The triangle of a QR factorisation has the same minimum, however many the rows were.
    if a.nrows() > a.ncols() + 1 {
        let mut triangle = a.clone().insert_column(a.ncols(), 0.0);
        triangle.set_column(a.ncols(), b);
        let r = triangle.qr().r();
        return settled(&r.columns(0, a.ncols()).into_owned(), &r.column(a.ncols()).into_owned());
    }
    settled(a, b)
}

/// The active-set method itself.
fn settled(a: &DMatrix<f64>, b: &DVector<f64>) -> DVector<f64> {
    let columns = a.ncols();
    // Columns of one scale, so that one tolerance serves all.
    let scale: Vec<f64> = a.column_iter().map(|c| c.norm().max(f64::MIN_POSITIVE)).collect();
    let mut scaled = a.clone();
    for (mut column, s) in scaled.column_iter_mut().zip(&scale) {
        column /= *s;
    }
    let tolerance = 1e-10 * b.norm().max(f64::MIN_POSITIVE);

    let mut x = DVector::zeros(columns);
    let mut passive = vec![false; columns];
    // Each round frees one column; the bound only guards against cycling on rounding errors.
    for _ in 0..3 * columns {
        let gradient = scaled.transpose() * (b - &scaled * &x);
        let free = (0..columns).filter(|&j| !passive[j]).max_by(|&i, &j| gradient[i].total_cmp(&gradient[j]));
        let Some(free) = free.filter(|&j| gradient[j] > tolerance) else { break };
        passive[free] = true;
        loop {
            let solution = solve(&scaled, b, &passive);
            let blocking = (0..columns).filter(|&j| passive[j] && solution[j] <= 0.0);
            // How far from x towards the solution before a component reaches zero.
            let step = blocking.map(|j| x[j] / (x[j] - solution[j])).min_by(f64::total_cmp);
            let Some(step) = step else {
                x = solution;
                break;
            };
            x = &x + (&solution - &x) * step;
            for j in 0..columns {
                if passive[j] && x[j] <= 1e-12 {
                    passive[j] = false;
                    x[j] = 0.0;
                }
            }
            if passive.iter().all(|p| !p) {
                break;
            }
        }
    }
    for (value, s) in x.iter_mut().zip(&scale) {
        *value /= *s;
    }
    x
}

/// Least squares over the passive columns; zero elsewhere.
fn solve(a: &DMatrix<f64>, b: &DVector<f64>, passive: &[bool]) -> DVector<f64> {
    let columns: Vec<usize> = (0..a.ncols()).filter(|&j| passive[j]).collect();
    let reduced = a.select_columns(&columns);
    let mut full = DVector::zeros(a.ncols());
    // Columns that depend on each other (a grid without variety) share their cost: least norm.
    if let Ok(solution) = reduced.svd(true, true).solve(b, 1e-9) {
        for (value, &j) in solution.iter().zip(&columns) {
            full[j] = *value;
        }
    }
    full
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_known_costs() {
        let a = DMatrix::from_row_slice(4, 2, &[1.0, 1.0, 1.0, 2.0, 1.0, 3.0, 1.0, 4.0]);
        let x = nnls(&a, &DVector::from_column_slice(&[5.0, 7.0, 9.0, 11.0]));
        assert!((x[0] - 3.0).abs() < 1e-9 && (x[1] - 2.0).abs() < 1e-9, "{x}");
    }

    #[test]
    fn what_would_be_negative_is_zero() {
        // Plain least squares would give the line an intercept of -2.
        let a = DMatrix::from_row_slice(3, 2, &[1.0, 1.0, 1.0, 2.0, 1.0, 3.0]);
        let x = nnls(&a, &DVector::from_column_slice(&[1.0, 4.0, 7.0]));
        assert_eq!(x[0], 0.0);
        assert!((x[1] - 30.0 / 14.0).abs() < 1e-9, "{x}");
    }

    proptest! {
        /// The Karush–Kuhn–Tucker conditions, which hold at the optimum alone.
        #[test]
        fn is_optimal(values in prop::collection::vec(0.0f64..10.0, 24), b in prop::collection::vec(-5.0f64..20.0, 8)) {
            let a = DMatrix::from_row_slice(8, 3, &values);
            let b = DVector::from_vec(b);
            let x = nnls(&a, &b);
            let gradient = a.transpose() * (&b - &a * &x);
            for j in 0..3 {
                prop_assert!(x[j] >= 0.0);
                prop_assert!(gradient[j] < 1e-5, "moving {} would help by {}", j, gradient[j]);
                prop_assert!(x[j] == 0.0 || gradient[j].abs() < 1e-5, "{} is not settled: {}", j, gradient[j]);
            }
        }
    }
}
