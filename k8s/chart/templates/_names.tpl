{{/*
A name of at most 54 characters: (list root "suffix" …). What is too long ends with a digest of the whole.
Labels hold 63, and KEDA makes one of "keda-hpa-" and a name.
*/}}
{{- define "drbert.name" -}}
{{- $root := first . -}}
{{- $whole := prepend (rest .) (default $root.Release.Name $root.Values.nameOverride) | join "-" -}}
{{- if gt (len $whole) 54 -}}
{{- printf "%s-%s" ($whole | trunc 45 | trimSuffix "-") (sha256sum $whole | trunc 8) -}}
{{- else -}}
{{- $whole -}}
{{- end -}}
{{- end -}}

{{/* What selects pods: (dict "root" $ "component" "arm" "arm" $name). Never changes, for selectors cannot. */}}
{{- define "drbert.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .arm }}
arm: {{ . }}
{{- end }}
{{- end -}}

{{- define "drbert.labels" -}}
{{ include "drbert.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* repository@digest or repository:tag of (list root image). */}}
{{- define "drbert.image" -}}
{{- $root := first . -}}
{{- $image := last . -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{- define "drbert.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "drbert.name" (list .)) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{/* Whole numbers come out of YAML as floats, and a million would be written 1e+06. */}}
{{- define "drbert.plain" -}}
{{- if not (kindIs "float64" .) -}}{{ . }}{{- else if eq (floor .) . -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- define "drbert.scheme" -}}
{{ ternary "https" "http" (ne .Values.tls.existingSecret "") }}
{{- end -}}

{{/* The port on which /metrics is answered. */}}
{{- define "drbert.metricsPort" -}}
{{ ternary "admin" "http" (eq (default "service" .Values.settings.metrics) "admin") }}
{{- end -}}
