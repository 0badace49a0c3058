#!/bin/sh
# Tries the chart on a cluster: sh k8s/cluster.sh. It makes one by kind where that is installed, and removes it afterwards; else it uses the
# cluster of KUBECONFIG, in a namespace of its own that it removes. Ends with 0 where neither is there, and says so.
set -eu
namespace=drbert-cluster-test
release=demo
image=drbert-serve:cluster-test
made=
namespaced=

say() { printf '\n== %s\n' "$*"; }
have() { command -v "$1" >/dev/null; }
skip() { echo "skipped: $*"; exit 0; }

for tool in docker helm kubectl; do have $tool || skip "$tool is not installed"; done
if have kind; then
    say "a cluster by kind"
    made=kind
    trap 'kind delete cluster --name $namespace' EXIT
    kind create cluster --name $namespace --wait 120s
    kubectl config use-context kind-$namespace
elif have minikube && minikube status >/dev/null 2>&1; then
    made=minikube
elif ! kubectl version --request-timeout=5s >/dev/null 2>&1; then
    skip "there is no kind, no running minikube, and no cluster behind KUBECONFIG"
fi

clean_up() {
    status=$?
    [ $status = 0 ] || { kubectl -n $namespace get pods,events; kubectl -n $namespace logs -l app.kubernetes.io/instance=$release --tail=50 || true; }
    if [ "$made" = kind ]; then
        kind delete cluster --name $namespace
    elif [ -n "$namespaced" ]; then
        kubectl delete namespace $namespace --wait=false
    fi
    exit $status
}
trap clean_up EXIT

say "the image"
docker build --quiet --target service -t $image .
case $made in
kind) kind load docker-image --name $namespace $image ;;
minikube) minikube image load $image ;;
*) echo "a cluster of your own must be able to pull $image" ;;
esac

kubectl create namespace $namespace
namespaced=yes
kubectl label namespace $namespace pod-security.kubernetes.io/enforce=restricted
upgrade() {
    helm -n $namespace upgrade --install $release k8s/chart -f k8s/values/cpu-small.yaml --set image.repository="${image%:*}" --set image.tag="${image#*:}" \
        --wait --timeout 5m "$@"
}
pods() { kubectl -n $namespace get pods -l "app.kubernetes.io/component=arm,arm=$1" --field-selector=status.phase=Running -o name | wc -l; }

say "install, and classify a sentence"
upgrade
helm -n $namespace test $release --logs

say "scale, upgrade, roll back"
upgrade --set arms.bert.replicas=2
[ "$(pods bert)" -ge 2 ]
upgrade --set arms.bert.replicas=2 --set settings.max_texts=64
helm -n $namespace rollback $release --wait
helm -n $namespace test $release

say "restart all pods under load of kept connections: every request is answered"
kubectl -n $namespace run caller --image=$image --restart=Never --overrides='{"spec": {"securityContext": {"runAsNonRoot": true, "runAsUser": 10001,
    "seccompProfile": {"type": "RuntimeDefault"}}, "containers": [{"name": "caller", "image": "'$image'", "securityContext": {"allowPrivilegeEscalation": false,
    "capabilities": {"drop": ["ALL"]}}, "command": ["python", "-c", "import http.client,json,time\nend,asked,failed=time.time()+60,0,0\nc=None\nwhile time.time()<end:\n  try:\n    c=c or http.client.HTTPConnection(\"'$release'-bert\",8000,timeout=10)\n    c.request(\"POST\",\"/v1/classify\",json.dumps({\"input\":\"good\"}))\n    r=c.getresponse(); r.read(); asked+=1; failed+=r.status!=200\n    if r.getheader(\"connection\")==\"close\": c.close(); c=None\n  except OSError:\n    failed+=1; c=None\n  time.sleep(0.02)\nprint(asked,\"answered\",failed,\"failed\"); raise SystemExit(failed>0)"]}]}}'
kubectl -n $namespace wait --for=condition=Ready pod/caller --timeout=60s
kubectl -n $namespace rollout restart deployment/$release-bert
kubectl -n $namespace rollout status deployment/$release-bert --timeout=5m
kubectl -n $namespace wait --for=jsonpath='{.status.phase}'=Succeeded pod/caller --timeout=120s
kubectl -n $namespace logs caller

say "remove"
helm -n $namespace uninstall $release --wait
echo "all of it holds"
