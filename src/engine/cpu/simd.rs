//! Run-time choice of instruction set for the hottest loops.
//!
//! The program is compiled for any x86-64; `vectorised!` compiles a function three times (baseline,
//! AVX2 with FMA, AVX-512) and calls the best that the machine has. The bodies are plain Rust: only
//! the compiler's licence to use wider registers differs. Results may differ between machines in the
//! last bits, since a fused multiply-add rounds once.

/// `a · b + c`, fused where the instruction exists; a library call would take its place elsewhere.
pub(super) trait MulAdd {
    /// Whether [`f32::mul_add`] is one instruction here.
    const FUSED: bool;

    /// The sum.
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        if Self::FUSED { a.mul_add(b, c) } else { a * b + c }
    }
}

/// The baseline: a product and a sum.
pub(super) struct Baseline;

impl MulAdd for Baseline {
    const FUSED: bool = false;
}

/// AVX2 with FMA, and above.
#[cfg(target_arch = "x86_64")]
pub(super) struct Fused;

#[cfg(target_arch = "x86_64")]
impl MulAdd for Fused {
    const FUSED: bool = true;
}

/// Defines `$name`, which runs `$body::<M>` compiled for the best instruction set at hand; `$body` must
/// be `#[inline(always)]` and generic over [`MulAdd`].
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::engine::cpu::simd::Fused>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::engine::cpu::simd::Fused>($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("fma")
                {
                    // SAFETY: the machine has every feature that the function is compiled for.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body::<$crate::engine::cpu::simd::Baseline>($($arg),*)
        }
    };
}

pub(super) use vectorised;
